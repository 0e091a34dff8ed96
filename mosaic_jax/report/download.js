"use strict";
// Figures as files: the drawing as it is on the page, or painted on a canvas.
function drawing(figure) {
  const svg = figure.querySelector("svg");
  const clone = svg.cloneNode(true);
  const style = getComputedStyle(svg);
  const box = svg.viewBox.baseVal;
  clone.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  clone.setAttribute("width", box.width);
  clone.setAttribute("height", box.height);
  const text = new XMLSerializer()
    .serializeToString(clone)
    .replaceAll("currentColor", style.color)
    .replace(/var\((--\w+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  return { text, width: box.width, height: box.height };
}

function save(name, address) {
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
}

function get(event) {
  const button = event.target;
  const figure = button.closest("figure");
  const { text, width, height } = drawing(figure);
  const name = figure.dataset.name;
  const address = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  if (button.dataset.get === "svg") {
    save(`${name}.svg`, address);
    return;
  }
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 3 * width;
    canvas.height = 3 * height;
    const brush = canvas.getContext("2d");
    brush.fillStyle = getComputedStyle(document.body).backgroundColor;
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.drawImage(image, 0, 0, canvas.width, canvas.height);
    save(`${name}.png`, canvas.toDataURL("image/png"));
  };
  image.src = address;
}

for (const button of document.querySelectorAll("[data-get]")) {
  button.addEventListener("click", get);
}
