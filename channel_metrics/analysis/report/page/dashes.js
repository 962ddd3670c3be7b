// The one legend of lines and marks: only what this page has.
const sample = (classes, shape = "path") => {
  const svg = drawn("svg", { width: 28, height: 12, "aria-hidden": "true" });
  if (shape === "path") svg.append(drawn("path", { class: `line ${classes}`, d: "M1 6H27" }));
  else if (shape === "ring") svg.append(drawn("circle", { class: `mark ${classes}`, cx: 14, cy: 6, r: 3.5 }));
  else if (shape === "area") svg.append(drawn("rect", { class: `band ${classes}`, y: 1, width: 28, height: 10 }));
  else svg.append(drawn("path", { class: `event ${classes}`, d: "M14 0V12" }));
  return svg;
};

const hasMark = (kind) => DATA.marks.some((marks) => marks.some((mark) => mark.kind === kind));
const MEANINGS = [
  [DATA.curves.some((c) => c.channel === WHOLE_RUN && c.metric === "loss"), "whole run0", "path", severalRuns ? "grey: the whole run, with the dash of its run" : "whole run, as the trainer logged it"],
  [splits.some((split) => split !== "train"), "whole-sample", "ring", "evaluation"],
  [DATA.curves.some((c) => c.low), "whole-sample", "area", "95 % interval"],
  [DATA.curves.some((c) => c.overwritten), "overwritten whole-sample", "path", "overwritten after a resume"],
  [hasMark("resume"), "resume", "event", "resumed"],
  [hasMark("alert"), "alert", "event", "alert"],
  [hasMark("evaluation"), "evaluation", "event", "step with an evaluation"],
  [DATA.plan.some((plan) => Object.values(plan).some((share) => share !== null)), "plan whole-sample", "path", "configured share"],
];
for (const [there, classes, shape, text] of MEANINGS) {
  if (there) find("#dashes").append(element("li", {}, sample(classes, shape), text));
}
