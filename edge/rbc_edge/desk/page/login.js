"use strict";
document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await fetch("login", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(document.getElementById("password").value),
  });
  if (answer.ok) location.reload();
  else document.getElementById("said").textContent = await answer.text();
});
