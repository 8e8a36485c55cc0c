// Makes every everystep table in the document browsable, once. Runs in standalone pages and in notebooks.
(() => {
  "use strict";

  const numberOf = (cell) => {
    if (cell === "") return null;
    if (cell === "nan") return NaN;
    return Number(String(cell).replace("inf", "Infinity"));
  };

  // Numbers, then NaN; blanks last in both directions.
  const compare = (a, b, direction) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (Number.isNaN(a) || Number.isNaN(b)) return direction * (Number.isNaN(a) - Number.isNaN(b));
    return direction * (a < b ? -1 : a > b ? 1 : 0);
  };

  const prepared = (DataTable) => {
    const order = DataTable.ext.type.order;
    order["everystep-pre"] = numberOf;
    order["everystep-asc"] = (a, b) => compare(a, b, 1);
    order["everystep-desc"] = (a, b) => compare(a, b, -1);
    DataTable.ext.errMode = "throw";
    return DataTable;
  };

  const enhance = async (root) => {
    const data = JSON.parse(root.querySelector("script.rows").textContent);
    const DataTable = prepared(await window.everystepDataTables);
    const rows = data.columns[0].map((_, row) => data.columns.map((column) => column[row]));
    const exported = { title: null, filename: `${data.name} losses` };
    new DataTable(root.querySelector("table"), {
      data: rows,
      columns: data.titles.map(() => ({ type: "everystep" })),
      order: [],
      autoWidth: false,
      pageLength: 10,
      lengthMenu: [10, 25, 100, 1000],
      layout: {
        topStart: { buttons: [
          { extend: "copyHtml5", text: "Copy", ...exported },
          { extend: "csvHtml5", text: "CSV", ...exported },
        ] },
        topEnd: "search",
        bottomStart: ["info", "pageLength"],
        bottomEnd: { paging: { buttons: 5, firstLast: false } },
      },
      language: {
        search: "Search",
        searchPlaceholder: "step or digits",
        lengthMenu: "_MENU_ per page",
        info: "_START_ to _END_ of _TOTAL_",
        infoEmpty: "no rows",
        infoFiltered: "(filtered from _MAX_)",
        zeroRecords: "no matching rows",
        emptyTable: "no steps",
        paginate: { previous: "←", next: "→" },
      },
    });
    root.querySelector(".static-note")?.remove();
  };

  for (const root of document.querySelectorAll(".everystep-table:not([data-ready])")) {
    root.dataset.ready = "";
    enhance(root).catch((error) => console.error("everystep: the interactive table failed to load:", error));
  }
})();
