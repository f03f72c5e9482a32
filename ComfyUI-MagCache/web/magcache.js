// The plan and the result of a run, as a picture and a text on the node that planned it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// The id of a node inside subgraphs is "12:3": node 3 of the subgraph of node 12.
function nodeOf(id) {
  const [last, ...outer] = String(id).split(":").reverse();
  let graph = app.rootGraph ?? app.graph;
  for (const name of outer.reverse()) graph = graph?.getNodeById(Number(name))?.subgraph;
  return graph?.getNodeById(Number(last));
}

function widgetOf(node) {
  const known = node.widgets?.find((widget) => widget.name === "magcache_said");
  if (known) return known;
  const element = document.createElement("div");
  element.className = "magcache-said";
  Object.assign(element.style, { overflow: "auto", fontSize: "11px", userSelect: "text" });
  const widget = node.addDOMWidget("magcache_said", "magcache_said", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 150,
  });
  widget.serialize = false; // no value of a workflow
  return widget;
}

api.addEventListener("magcache", ({ detail }) => {
  const node = nodeOf(detail.node);
  if (!node) return;
  const element = widgetOf(node).element;
  element.innerHTML = detail.picture;
  const text = document.createElement("pre");
  Object.assign(text.style, { whiteSpace: "pre-wrap", margin: "4px", fontFamily: "monospace" });
  text.textContent = detail.text;
  element.append(text);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 330), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
});

app.registerExtension({ name: "magcache.said" });
