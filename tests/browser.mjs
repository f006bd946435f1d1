// Opens a page as a reader would, and prints what happened as JSON.
//   node browser.mjs MODULES BROWSER PAGE
// MODULES has puppeteer-core and axe-core in node_modules.
import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, executablePath, page] = process.argv.slice(2);
const require = createRequire(path.join(modules, "index.js"));
const puppeteer = require("puppeteer-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox"] });
const found = { errors: [], requests: [], violations: {}, background: {}, focused: [] };
try {
  const tab = await browser.newPage();
  await tab.setViewport({ width: 1200, height: 900 });
  tab.on("console", (message) => found.errors.push(message.text()));
  tab.on("pageerror", (error) => found.errors.push(String(error)));
  tab.on("request", (request) => {
    if (!request.url().startsWith("data:")) found.requests.push(request.url());
  });
  for (const value of ["dark", "light"]) {
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value }]);
    await tab.goto(pathToFileURL(page), { waitUntil: "load" });
    await tab.evaluate(() => document.querySelectorAll("details").forEach((x) => (x.open = true)));
    await tab.evaluate(axe);
    const result = await tab.evaluate(() => axe.run());
    found.violations[value] = result.violations.map(({ id, nodes }) => [id, nodes[0].html]);
    found.background[value] = await tab.evaluate(
      () => getComputedStyle(document.body).backgroundColor);
  }
  await tab.reload({ waitUntil: "load" });
  found.broken = await tab.evaluate(() =>
    [...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt));
  found.figures = await tab.evaluate(() => document.querySelectorAll("figure").length);
  found.wide = await tab.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  for (let i = 0; i < 400; i++) {
    await tab.keyboard.press("Tab");
    const name = await tab.evaluate(() => {
      const own = document.activeElement;
      if (own === document.body) return null;
      const top = own.getBoundingClientRect().top + scrollY;
      return [own.tagName, own.className, own.getAttribute("aria-label") || own.textContent, top];
    });
    if (name === null) break;
    found.focused.push(name);
  }
  if (await tab.$(".map")) {
    await tab.focus(".map");
    await tab.keyboard.press("ArrowRight");
    await tab.keyboard.press("ArrowLeft");
    found.spoken = await tab.$eval(".map [aria-live]", (own) => own.textContent);
    const dot = await tab.$(".map circle");
    await dot.hover();
    found.hovered = await tab.$eval(".map .tip", (own) => [own.hidden, own.textContent]);
    found.thumbnail = await tab.$eval(".map .tip i", (own) => own.style.backgroundImage.length);
  }
  await tab.emulateMediaType("print");
  found.printed = await tab.evaluate(() =>
    [getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector("nav")).display]);
  await tab.emulateMediaType("screen");
  await tab.setViewport({ width: 390, height: 800 });
  found.wideOnPhone = await tab.evaluate(() => document.documentElement.scrollWidth > innerWidth);
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
