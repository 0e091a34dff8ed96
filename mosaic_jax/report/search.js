"use strict";
// Rows of many clients are data; only those asked for become elements.
const clients = JSON.parse(document.getElementById("clients-data").textContent);
const input = document.getElementById("clients-search");
const body = document.getElementById("clients-rows");
const told = document.getElementById("clients-told");
const most = 50;

function show() {
  const wanted = input.value.trim().toLowerCase();
  const found = clients.filter(
    (row) => !wanted || row[0] === wanted || row.join(" ").toLowerCase().includes(wanted)
  );
  found.sort((a, b) => (b[0] === wanted) - (a[0] === wanted));
  body.replaceChildren(
    ...found.slice(0, most).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = value;
        line.append(cell);
      });
      return line;
    })
  );
  const shown = Math.min(found.length, most);
  told.textContent = `${shown} of ${found.length} clients found, ${clients.length} in all`;
}

input.addEventListener("input", show);
show();
