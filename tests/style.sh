#!/bin/bash
# Fails if a tracked text file contains a pattern from the list in STYLE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
patterns=$(sed -n '/^```style$/,/^```$/p' STYLE.md | sed '1d;$d')
test -n "$patterns"
found=0
git grep -nIiE -f <(printf '%s\n' "$patterns") -- . ':!STYLE.md' ':!fuzz/seeds' ':!LICENSE' || found=$?
if [ "$found" = 0 ]; then
    echo "error: the lines above use patterns that STYLE.md lists" >&2
    echo "  help: rewrite the sentence: name the actor, use the term of the field" >&2
    exit 1
fi
test "$found" = 1
