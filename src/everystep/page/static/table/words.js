// The layout and the texts of DataTables.

/** The layout of DataTables. */
export const LAYOUT = {
  topStart: null,
  topEnd: null,
  bottomStart: ["info", "pageLength"],
  bottomEnd: { paging: { buttons: 5, firstLast: false } },
};

/** The texts of DataTables. */
export const WORDS = {
  lengthMenu: "_MENU_ per page",
  info: "_START_ to _END_ of _TOTAL_",
  infoEmpty: "no rows",
  infoFiltered: "(filtered from _MAX_)",
  zeroRecords: "no matching steps",
  emptyTable: "no steps",
  paginate: { previous: "←", next: "→" },
};
