#!/usr/bin/env bash
# The comparison of the methods in docs/study.md. Trains what docs/study.csv lacks, then writes the
# tables; what was interrupted goes on where it stood. PYTHON chooses the interpreter, JOBS how many
# runs at once (one thread each on a CPU).
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
"$python" scripts/study.py train --jobs "${JOBS:-2}"
"$python" scripts/study.py time
"$python" scripts/study.py tables
