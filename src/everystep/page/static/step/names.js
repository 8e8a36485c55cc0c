// What a parameter is called: by its layer, for people who do not know its path.

/** Return `Linear 0 · weight` of `0.weight`; the path itself where the layer is not known. */
export function parameterName({ network }, parameter) {
  const dot = parameter.lastIndexOf(".");
  const path = parameter.slice(0, Math.max(dot, 0));
  const layer = network.find((one) => one.path === path);
  return layer?.type && dot > 0 ? `${layer.type} ${path} · ${parameter.slice(dot + 1)}` : parameter;
}
