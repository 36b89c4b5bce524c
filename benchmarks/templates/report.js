// The report of a run: its figures are made by the host, nothing changes but their colours and widths.

const figures = JSON.parse(document.getElementById("figures").textContent);

keepDrawn(() => {
  for (const [id, figure] of Object.entries(figures)) drawFigure(id, figure);
});
