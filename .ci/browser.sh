#!/usr/bin/env bash
# Installs a browser, and what a test drives it with, to look at reports as their readers do.
# Whatever cannot be installed is only told: that test is skipped without it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  {
    timeout 120 apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends \
        chromium > /dev/null
  } || echo "chromium could not be installed"
fi
if command -v npm > /dev/null && ! [ -d .browser/node_modules/axe-core ]; then
  timeout 180 npm install --silent --no-audit --no-fund --ignore-scripts --prefix .browser \
    puppeteer-core@24.43.1 axe-core@4.14.1 || echo "puppeteer-core and axe-core could not be installed"
fi
exit 0
