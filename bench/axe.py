"""Every kind of page under axe-core in headless Chromium, in light and in dark.

Needs node's npm and chromium; nothing of the package does. Exit status 1 where axe finds anything
serious or critical, or where a page asks for anything beyond itself.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_RUN = """
<script>{axe}</script>
<script>
document.querySelectorAll("details").forEach((d) => {{ d.open = true; }});
axe.run(document, {{resultTypes: ["violations"]}}).then((found) => {{
  const out = document.createElement("pre");
  out.id = "axe-result";
  out.textContent = JSON.stringify(found.violations.map((v) => ({{
    id: v.id, impact: v.impact, help: v.help,
    nodes: v.nodes.slice(0, 5).map((n) => n.html.slice(0, 160) + " | " + (n.failureSummary || "")),
  }})));
  document.body.append(out);
}});
</script>
"""
_CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")


def pages(folder: Path) -> list[Path]:
    """One page of every kind, made by the commands."""
    train = ("train", "--quiet", "--epochs", "2", "--run-dir")
    plan = ("compare", "--quiet", "--data", "iris", "--norm", "none,batch", "--seeds", "3")
    commands = [
        [*train, str(folder / "rows"), "--data", "iris"],
        [*train, str(folder / "images"), "--data", "digits", "--model", "convnet"],
        [*plan, "--epochs", "2", "--store", str(folder / "s.sqlite"), "-o", f"{folder}/study.html"],
        ["claims", "--quick", "--quiet", "regularizes", "--data", "digits", "--seeds", "3",
         "--store", str(folder / "c.sqlite"), "-o", f"{folder}/claims.html"],
        ["doctor", str(folder / "images"), "-o", f"{folder}/doctor.html"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "truenorm", *command], check=False)
        if done.returncode > 1:  # 1 are findings of the doctor
            raise SystemExit(f"truenorm {' '.join(command)} exited with {done.returncode}")
    return [
        folder / "rows" / "report.html",
        folder / "images" / "report.html",
        *(folder / f"{name}.html" for name in ("study", "claims", "doctor")),
    ]


def examined(page: Path, axe: str, *, dark: bool) -> list[dict[str, Any]]:
    """What axe finds on a page."""
    text = page.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(text.replace("</body>", _RUN.format(axe=axe) + "</body>"), "utf-8")
        command = ["chromium", *_CHROMIUM, *(_DARK if dark else ())]
        command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=20000"]
        done = subprocess.run(
            [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, check=True
        )
    result = re.search(r'<pre id="axe-result">(.*?)</pre>', done.stdout, re.S)
    if result is None:
        raise SystemExit(f"{page}: axe did not end")
    found: list[dict[str, Any]] = json.loads(html.unescape(result.group(1)))
    return found


def main() -> None:
    """Make the pages, or take those given, and examine each twice."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--axe", type=Path, default=Path(".axe"), help="npm's folder of axe-core")
    options.add_argument("pages", nargs="*", type=Path, help="by default one of every kind")
    told = options.parse_args()
    for program in ("chromium", "npm"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is needed and not installed.")
    script = told.axe / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        subprocess.run(["npm", "install", "--prefix", str(told.axe), "axe-core@4"], check=True)
    axe, serious = script.read_text("utf-8"), 0
    with tempfile.TemporaryDirectory() as folder:
        for page in told.pages or pages(Path(folder)):
            for dark in (False, True):
                for found in examined(page.absolute(), axe, dark=dark):
                    grave = found["impact"] in ("serious", "critical")
                    serious += grave
                    print(f"{page.name} {'dark' if dark else 'light'}: {found['impact']} "
                          f"{found['id']}: {found['help']}")  # fmt: skip
                    for node in found["nodes"] if grave else ():
                        print(f"    {node}")
    print(f"{serious} serious or critical findings")
    raise SystemExit(bool(serious))


if __name__ == "__main__":
    main()
