// Sets window.everystepDataTables, once, to a promise of the library in the document: gzip, in base64, in a script element of no known
// type. Runs in pages of its own and in notebooks.
window.everystepDataTables ??= (async (element) => {
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const text = await new Response(stream).text();
  const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  try {
    return (await import(address)).default;
  } finally {
    URL.revokeObjectURL(address);
  }
})(document.querySelector("script.datatables"));
