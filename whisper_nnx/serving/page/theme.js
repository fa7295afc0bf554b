// Loaded before the page is drawn, so that a chosen theme does not flash. Without a choice the system's theme holds.
const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
