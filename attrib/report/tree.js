// All groups as a tree, by the dots in their names: layer > module > tensor, with the sum at each.

let branches = [];  // of the tree as it stands in the page: the groups below each, and the elements that hold its numbers

function grown(names) {
  const root = { name: "", children: new Map(), groups: range(names.length) };
  names.forEach((name, g) => {
    let node = root;
    name.split(".").forEach((part, k, parts) => {
      const key = k === parts.length - 1 ? `${part}\n${g}` : part;  // a tensor is no module of the same name
      if (!node.children.has(key)) node.children.set(key, { name: part, children: new Map(), groups: [] });
      node = node.children.get(key);
      node.groups.push(g);
    });
  });
  return root;
}

// a module that holds one thing is one line with it
function joined(node) {
  const children = [...node.children.values()].map(joined);
  return children.length === 1 && node.name
    ? { ...children[0], name: `${node.name}.${children[0].name}` } : { ...node, children };
}

function branch(node, depth, open) {
  const line = element(node.children.length ? "summary" : "div", "", "branch"), name = element("span", node.name, "name");
  const numbers = page.layers.rows.map(() => element("span", "", "number")), bar = element("span", "", "bar");
  name.style.paddingLeft = `${1.2 * depth}rem`;
  bar.append(element("span"));
  line.append(name, ...numbers, bar);
  branches.push({ groups: node.groups, numbers, mark: bar.firstChild });
  if (!node.children.length) return line;
  const folds = element("details");
  folds.open = open;
  folds.append(line, ...node.children.map((child) => branch(child, depth + 1, false)));
  return folds;
}

function plantTree() {
  const tree = page.layers && page.layers.tree, root = tree && joined(grown(tree.groups));
  $("tree-section").hidden = !tree || !root.children.some((child) => child.children.length);
  if ($("tree-section").hidden) return;
  const head = element("div", "", "branch head");
  head.append(element("span", "group", "name"), ...page.layers.rows.map(({ name }) => element("span", name, "number")),
    element("span"));
  $("tree").style.setProperty("--numbers", page.layers.rows.length);
  $("tree").append(head, branch({ ...root, name: `all ${tree.groups.length} groups` }, 0, true));
  $("tree-said").textContent = tree.by_window ? "In the chosen window." : "Over all steps, whatever the window.";
  const fold = (open) => $("tree").querySelectorAll("details details").forEach((each) => { each.open = open; });
  $("fold").addEventListener("click", () => fold(false));
  $("unfold").addEventListener("click", () => fold(true));
}

function showTree() {
  if ($("tree-section").hidden) return;
  const { values, by_window } = page.layers.tree, [low, high] = by_window ? [now.from, now.to] : [0, 1];
  const each = values.map((array) => range(array.shape[2]).map(
    (g) => sum(range(high - low).map((b) => at(array, now.query, low + b, g)))));
  const sums = branches.map(({ groups }) => each.map((all) => sum(groups.map((g) => all[g]))));
  const largest = Math.max(1e-30, ...sums.map(([first]) => Math.abs(first)));
  branches.forEach(({ numbers, mark }, k) => {
    numbers.forEach((span, r) => { span.textContent = number(sums[k][r]); span.dataset.value = sums[k][r]; });
    mark.className = sums[k][0] < 0 ? "down" : "up";
    mark.style.width = `${(100 * Math.abs(sums[k][0])) / largest}%`;
  });
}
