// SPDX-License-Identifier: Apache-2.0
// Keeps the overview up to date. The page is complete without it.
"use strict";
const content = document.getElementById("content");
const stale = document.getElementById("stale");
let next = null; // what to show once nobody is about to use what is shown now

function show() {
  if (next === null || content.contains(document.activeElement)) return;
  content.innerHTML = next; // made and escaped by the guard
  next = null;
}

const events = new EventSource("/console/events");
events.onopen = () => { stale.hidden = true; };
events.onerror = () => { stale.hidden = false; };
events.onmessage = (event) => {
  next = JSON.parse(event.data).html;
  show();
};
content.addEventListener("focusout", () => { setTimeout(show, 0); });
