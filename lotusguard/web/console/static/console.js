// SPDX-License-Identifier: Apache-2.0
// Keeps the overview up to date. The page is complete without it.
"use strict";
const content = document.getElementById("content");
const events = new EventSource("/console/events");
events.onmessage = (event) => {
  if (content.contains(document.activeElement)) return; // do not move what somebody is about to use
  content.innerHTML = JSON.parse(event.data).html; // made and escaped by the guard
};
