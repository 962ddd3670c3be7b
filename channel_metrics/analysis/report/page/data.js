// The numbers of the page. Channels and runs are indices; names are only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const WHOLE_RUN = -1;

const integrate = (differences) => {
  let sum = 0;
  return differences.map((difference) => (sum += difference));
};

for (const curve of DATA.curves) {
  curve.steps = integrate(curve.steps);
  if (curve.tokens) curve.tokens = integrate(curve.tokens);
}
for (const axes of DATA.axes) for (const axis of Object.values(axes)) axis.steps = integrate(axis.steps);

const severalRuns = DATA.runs.length > 1;
const hasSmooth = DATA.curves.some((curve) => curve.smooth);
const splits = [...new Set(DATA.curves.map((curve) => curve.split))];

// Of several runs, what a channel is ordered by in the legend is its value in the first that has it.
const rowOf = DATA.channels.map((_, channel) => DATA.rows.find((row) => row.channel === channel));

const nameOf = (channel) => (channel === WHOLE_RUN ? "whole run" : DATA.channels[channel]);

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
};

const drawn = (tag, attributes = {}, text = null) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  if (text !== null) made.textContent = text;
  return made;
};

const find = (selector) => document.querySelector(selector);
const findAll = (selector) => [...document.querySelectorAll(selector)];
