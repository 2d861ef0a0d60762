// As much of a browser as the report's scripts need: elements that keep their children, and a canvas that draws nothing.
"use strict";

class HTMLElement {
  constructor(tag = "div", text = "") {
    Object.assign(this, { tag, nodeValue: text, childNodes: [], dataset: {}, hidden: false, heard: {}, clientWidth: 600 });
    this.classes = new Set();
    this.classList = {
      add: (...names) => names.forEach(name => this.classes.add(name)), remove: name => this.classes.delete(name),
      contains: name => this.classes.has(name), toggle: name => this.classes.has(name) || this.classes.add(name),
    };
    this.style = { setProperty() {}, removeProperty() {} };
    if (tag === "canvas") this.getContext = () => context;
  }
  get firstChild() { return this.childNodes[0] ?? null; }
  get textContent() { return this.nodeValue + this.childNodes.map(node => node.textContent).join(""); }
  set textContent(text) { this.childNodes = [new HTMLElement("text", text)]; }
  set className(names) { names.split(" ").forEach(name => this.classes.add(name)); }
  appendChild(node) { node.parentElement = this; this.childNodes.push(node); return node; }
  insertBefore(node) { return this.appendChild(node); }
  remove() { const all = this.parentElement?.childNodes ?? []; if (all.includes(this)) all.splice(all.indexOf(this), 1); }
  setAttribute() {}
  querySelector(name) { return this.childNodes.find(node => node.tag === name) ?? null; }
  addEventListener(name, handler) { (this.heard[name] ??= []).push(handler); }
  removeEventListener() {}
  dispatchEvent(event) { (this.heard[event.type] ?? []).forEach(handler => handler(event)); }
  getBoundingClientRect() { return { left: 0, top: 0, width: 600, height: 250 }; }
}

const context = new Proxy({}, {
  get: (kept, name) => name === "measureText" ? text => ({ width: 6 * text.length }) : kept[name] ?? (() => {}),
  set: (kept, name, value) => { kept[name] = value; return true; },
});

class Event { constructor(type, fields) { Object.assign(this, { type, ...fields }); } }

const byId = { data: new HTMLElement("script", DATA), smoothing: new HTMLElement("input"), reset: new HTMLElement("button") };
const nodes = JSON.parse(DATA).figures.map((figure, number) => {
  const node = new HTMLElement();
  new HTMLElement("figure").appendChild(node).parentElement.appendChild(new HTMLElement("button"));
  node.dataset.figure = number;
  return node;
});
Object.assign(globalThis, {
  window: globalThis, devicePixelRatio: 1, MouseEvent: Event, CustomEvent: Event, navigator: { userAgent: "" },
  Path2D: class { constructor() { return context; } },
  ResizeObserver: class { observe() {} },
  getComputedStyle: () => ({ getPropertyValue: () => "#123456" }),
  matchMedia: () => new HTMLElement(), addEventListener() {}, removeEventListener() {}, dispatchEvent() {},
  requestAnimationFrame: call => call(), setTimeout: call => call(), clearTimeout() {},
  document: Object.assign(new HTMLElement(), {
    documentElement: new HTMLElement(), body: new HTMLElement(), getElementById: id => byId[id], querySelectorAll: () => nodes,
    createElement: tag => new HTMLElement(tag), createTextNode: text => new HTMLElement("text", text),
  }),
});
