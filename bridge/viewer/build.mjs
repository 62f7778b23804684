// Bundle src/ and d3 into viewer.js, fonts into fonts.css, and their licences into licences.txt: `make viewer`, once per change.

import { build } from "esbuild";
import { createHash } from "node:crypto";
import { existsSync, readFileSync, readdirSync, writeFileSync } from "node:fs";

const FONTS = [
  ["Inter", "inter", "100 900"],
  ["JetBrains Mono", "jetbrains-mono", "100 800"],
];

const digest = createHash("sha256");
for (const file of [
  ...readdirSync("src")
    .sort()
    .map((name) => `src/${name}`),
  "package-lock.json",
])
  digest.update(readFileSync(file));
const result = await build({
  entryPoints: ["src/main.js"],
  bundle: true,
  format: "iife",
  target: "es2022",
  minify: true,
  charset: "ascii",
  legalComments: "none",
  write: false,
});
writeFileSync(
  "viewer.js",
  `// made by build.mjs from src/ and d3; sources ${digest.digest("hex")}\n${result.outputFiles[0].text}`,
);

const { packages } = JSON.parse(readFileSync("package-lock.json"));
const named = Object.keys(packages)
  .filter((path) => path && !packages[path].dev)
  .map((path) => path.replace("node_modules/", ""))
  .sort();
const licence = (name) => {
  const file = ["LICENSE", "LICENSE.md", "LICENSE.txt"].map((one) => `node_modules/${name}/${one}`).find(existsSync);
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  if (!file) throw new Error(`${name} has no licence`);
  return `${name} ${version}\n\n${readFileSync(file, "utf8").trim()}\n`;
};
writeFileSync("licences.txt", named.map(licence).join(`\n${"-".repeat(78)}\n\n`));

const faces = FONTS.map(([family, name, weights]) => {
  const data = readFileSync(`node_modules/@fontsource-variable/${name}/files/${name}-latin-wght-normal.woff2`).toString("base64");
  return `@font-face{font-family:"${family}";font-weight:${weights};font-display:block;src:url(data:font/woff2;base64,${data}) format("woff2")}\n`;
});
writeFileSync("fonts.css", faces.join(""));
