"use strict";
// The numbers under the pointer: of every line of a chart, those of the nearest iteration.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const cursor = plot.querySelector(".cursor");
  const output = plot.querySelector("output");
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = data.low + share * (data.high - data.low);
    const first = data.lines.reduce((best, line) => line.x.length > best.x.length ? line : best);
    const step = first.x[nearest(first.x, wanted)];
    const place = (step - data.low) / (data.high - data.low);
    const told = data.lines.map((line) => {
      const at = nearest(line.x, step);
      const value = line.y[at] === null ? "not finite" : line.y[at];
      return `${line.label}: ${value}` + (line.x[at] === step ? "" : ` (iteration ${line.x[at]})`);
    });
    output.textContent = [`iteration ${step}`, ...told].join("\n");
    cursor.style.left = `${100 * place}%`;
    cursor.style.display = output.style.display = "block";
    output.style.left = `${Math.max(0, Math.min(place * box.width + 8, box.width - output.offsetWidth))}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { cursor.style.display = output.style.display = "none"; });
}
