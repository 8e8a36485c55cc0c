// Names of parameters by their layer, for readers who do not know the path.

/** Return `Linear 0 · weight` of `0.weight`; the path itself if the layer is unknown. */
export function parameterName({ network }, parameter) {
  const dot = parameter.lastIndexOf(".");
  const path = parameter.slice(0, Math.max(dot, 0));
  const layer = network.find((one) => one.path === path);
  return layer?.type && dot > 0 ? `${layer.type} ${path} · ${parameter.slice(dot + 1)}` : parameter;
}
