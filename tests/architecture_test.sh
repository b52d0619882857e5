#!/usr/bin/env bash
# Who may include whom, as docs/ARCHITECTURE.md says. Every #include "…" between folders that is not in the
# list below fails. With --self-test the rules are tried on lines that must fail and lines that must pass.
set -euo pipefail
cd "$(dirname "$0")/.."

# folder: folders whose public headers it may include, besides its own files and base/.
declare -A may=(
    [base]=''
    [engine/kernels]=''
    [router]='engine/kernels'
    [router/learn]=''
    [experts]='engine/kernels'
    [engine]='engine/kernels router experts'
    [scheduler]='engine engine/kernels'
    [agents]='scheduler'
    [proto]=''
    [server]='proto scheduler agents router router/learn engine engine/kernels'
    [tune]='engine engine/kernels'
    [cli]='server scheduler engine engine/kernels tune agents router router/learn experts proto'
)
# What other folders may include of a folder. The scheduler's and the server's faces speak in the engine's
# terms, so the engine's public headers are theirs too.
declare -A public=(
    [base]='base/*.h'
    [engine/kernels]='engine/kernels/kernels.h'
    [engine]='engine/engine.h engine/model_file.h engine/tokenizer.h engine/sampler.h engine/chat_template.h
              engine/chat_variables.h engine/adapter_file.h engine/adapter.h'
    [router]='router/router.h'
    [router/learn]='router/learn/learn.h router/learn/journal.h'
    [experts]='experts/experts.h'
    [scheduler]='scheduler/scheduler.h'
    [agents]='agents/agents.h'
    [proto]='proto/proto.h'
    [server]='server/server.h server/client.h'
    [tune]='tune/tune.h'
)
# The engine's parts that read model files, gates and tensors for surgery are open to tune/.
tune_extra='engine/pack_file.h engine/gguf.h engine/safetensors.h engine/families/families.h
            engine/adapter_pairs.h engine/philox.h'

folder_of() { # path of a file below one of the folders above, or nothing
    case $1 in
        engine/kernels/*) echo engine/kernels ;;
        router/learn/*) echo router/learn ;;
        */*) [ -z "${may[${1%%/*}]+known}" ] || echo "${1%%/*}" ;;
    esac
}

matches() { # path, patterns
    local pattern
    for pattern in $2; do
        # shellcheck disable=SC2053 # patterns are meant to match as patterns
        [[ $1 == $pattern ]] && return 0
    done
    return 1
}

# Nothing if `file` may include `header`, else a sentence.
verdict() { # file, header
    local from to
    from=$(folder_of "$1")
    to=$(folder_of "$2")
    [ -n "$to" ] && [ "$from" != "$to" ] || return 0
    if [ "$to" != base ] && ! matches "$to" "${may[$from]}"; then
        echo "$1 includes $2: $from/ may not know $to/"
    elif ! matches "$2" "${public[$to]}" && ! { [ "$from" = tune ] && matches "$2" "$tune_extra"; }; then
        echo "$1 includes $2, which is not a public header of $to/"
    fi
}

self_test() {
    local line file header want bad=0
    while read -r want file header; do
        line=$(verdict "$file" "$header")
        if [ "$want" = pass ] && [ -n "$line" ] || [ "$want" = fail ] && [ -z "$line" ]; then
            echo "self-test: $file -> $header should $want: $line"
            bad=1
        fi
    done <<'LINES'
pass engine/moe.c router/router.h
pass engine/moe.c engine/state.h
pass cli/serve.c server/server.h
pass server/server.h scheduler/scheduler.h
pass experts/store.c engine/kernels/kernels.h
pass base/file.c base/file.h
pass engine/moe.c stdio.h
pass router/learn/journal.c router/learn/journal_state.h
pass router/learn/journal.c base/base.h
pass server/feedback.c router/learn/journal.h
pass cli/serve.c router/learn/learn.h
fail base/file.c engine/engine.h
fail router/plan.c experts/experts.h
fail experts/store.c router/router.h
fail engine/engine.c scheduler/scheduler.h
fail scheduler/tick.c engine/state.h
fail scheduler/tick.c server/server.h
fail server/call.c engine/state.h
fail engine/kernels/dispatch.c engine/engine.h
fail cli/info.c engine/gguf.h
fail tune/upcycle.c scheduler/scheduler.h
fail router/plan.c engine/kernels/layout.h
fail router/learn/journal.c router/router.h
fail router/learn/journal.c engine/kernels/kernels.h
fail router/plan.c router/learn/journal.h
fail engine/moe.c router/learn/journal.h
fail scheduler/tick.c router/learn/journal.h
fail server/feedback.c router/learn/journal_state.h
LINES
    return $bad
}

if [ "${1:-}" = --self-test ]; then
    self_test
    exit
fi
bad=0 n=0
while IFS=: read -r file _ text; do
    header=${text#*\"}
    header=${header%%\"*}
    n=$((n + 1))
    case $header in
        ../* | */../* | ./*) sentence="$file includes $header: paths start at the root" ;;
        *) sentence=$(verdict "$file" "$header") ;;
    esac
    [ -z "$sentence" ] || {
        echo "$sentence"
        bad=$((bad + 1))
    }
done < <(grep -rHn --include='*.[chS]' --include='*.cu' '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' "${!may[@]}" 2>/dev/null | sort -u)
echo "$n includes, $bad forbidden"
[ "$n" -gt 50 ] && [ "$bad" -eq 0 ]
