// The plan and the result of a run, as a picture and a text on the node that planned it; and, on the classic page, its
// advanced inputs behind a button. Nodes 2.0 fold them themselves.
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

// Hide the advanced inputs of a new node. They stay its widgets, so a workflow keeps all values in their order. The state
// is that of Nodes 2.0, which does not look at `hidden`.
function fold(node) {
  if (app.extensionManager?.setting.get("Comfy.Node.AlwaysShowAdvancedWidgets")) return;
  const advanced = node.widgets.filter((widget) => widget.options?.advanced);
  const defaults = advanced.map((widget) => widget.value);
  const derived = (object, name, get) => Object.defineProperty(object, name, { configurable: true, get, set() {} });
  for (const widget of advanced) derived(widget, "hidden", () => !node.showAdvanced);
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    node.setSize([node.size[0], node.computeSize()[1]]);
    node.setDirtyCanvas(true, true);
  };
  const button = node.addWidget("button", "advanced inputs", null, toggle, { serialize: false, canvasOnly: true });
  button.serialize = false;
  derived(button, "label", () => (node.showAdvanced ? "Hide advanced inputs" : "Show advanced inputs"));
  // A workflow opens with those in sight that it has set or connected, unless it was saved folded.
  const { onConfigure } = node;
  node.onConfigure = function (saved) {
    onConfigure?.apply(this, arguments);
    const linked = new Set(node.inputs.filter((input) => input.link != null).map((input) => input.widget?.name));
    const used = advanced.some((widget, index) => widget.value !== defaults[index] || linked.has(widget.name));
    node.showAdvanced = saved.showAdvanced ?? used;
    if (node.showAdvanced) fit(node);
  };
  node.setSize(node.computeSize());
}

app.registerExtension({
  name: "magcache.said",
  nodeCreated(node) {
    if (node.comfyClass === "MagCache") fold(node);
  },
});
