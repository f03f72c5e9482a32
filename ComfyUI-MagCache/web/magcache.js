// The plan and the result of a run, as a picture and a text on the node that planned it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TALLEST = 400; // of what is shown; longer texts scroll

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
  const content = document.createElement("div");
  element.append(content);
  let height = 150;
  const widget = node.addDOMWidget("magcache_said", "magcache_said", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false; // no value of a workflow
  // How tall the text is shows when the page has laid it out, and again when the node's width is changed.
  new ResizeObserver(() => {
    if (!content.offsetHeight) return;
    height = Math.min(content.offsetHeight + 8, TALLEST);
    fit(node);
  }).observe(content);
  return widget;
}

// Make a node as large as it has to be, and no smaller than it is. Nodes 2.0 find their height themselves.
function fit(node) {
  const [width, wanted] = node.computeSize();
  const height = LiteGraph.vueNodesMode ? 0 : wanted;
  node.setSize([Math.max(node.size[0], width, 330), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

api.addEventListener("magcache", ({ detail }) => {
  const node = nodeOf(detail.node);
  if (!node) return;
  const content = widgetOf(node).element.firstChild;
  content.innerHTML = detail.picture;
  const text = document.createElement("pre");
  Object.assign(text.style, { whiteSpace: "pre-wrap", margin: "4px", fontFamily: "monospace" });
  text.textContent = detail.text;
  content.append(text);
  fit(node);
});

app.registerExtension({ name: "magcache.said" });
