"use strict";
// Charts in place of the drawings, in the colours of the page; prints keep the drawings.
function drawCharts() {
  const style = getComputedStyle(document.body);
  const line = style.getPropertyValue("--line").trim();
  for (const place of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = JSON.parse(place.nextElementSibling.textContent);
    const axis = { gridcolor: line, linecolor: line };
    Plotly.react(
      place,
      data,
      {
        ...layout,
        xaxis: { ...layout.xaxis, ...axis },
        yaxis: { ...layout.yaxis, ...axis },
        font: { family: style.fontFamily, color: style.color, size: 12 },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
      },
      { responsive: true, displaylogo: false, displayModeBar: false },
    );
  }
}

drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
