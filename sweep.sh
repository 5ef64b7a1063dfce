#!/usr/bin/env bash
# A grid of runs: does Muon beat AdamW when each has its best learning rate?
#   bash sweep.sh                here, a run per GPU, or per core (JOBS=4 bash sweep.sh: four)
#   bash sweep.sh --steps 50     these flags go to every run
#   bash sweep.sh list           only print the command lines
#   bash sweep.sh slurm          on the cluster, as job arrays (JOBS=4: at most four runs at once)
#   bash sweep.sh slurm --partition=gpu -- --steps 50     what stands before -- goes to sbatch
# Again: finished runs are skipped, interrupted ones resume, failed ones are tried again.
set -euo pipefail

sweep=muon-or-adamw       # its folder in runs/, and its group in wandb
command=(python train.py) # or (python mine.py), (uv run python train.py), (env A=1 python train.py)
export WANDB_RUN_GROUP=$sweep
best=min                  # which end of the first measure is best: min or max
common=(--steps 100)      # flags of every run
common+=(--eval-every 50 --eval-tokens 16384 --sample-tokens 0)

grid() { # a dimension is a loop, its value in the name, and its flag
  for optimizer in muon adamw; do
    for lr in 1e-3 3e-3 1e-2 3e-2 1e-1; do
      for seed in 1 2; do
        run "$optimizer-lr$lr-seed$seed" --optimizer "$optimizer" --lr "$lr" --seed "$seed"
      done
    done
  done
}

run() { # called by the grid, with a run's name and its own flags
  local name=$1 dir=runs/$sweep/$1 flag theirs
  local line=("${command[@]}" --run-dir "$dir" "${common[@]}" "${@:2}" "${extra[@]}")
  [[ "$name" =~ ^[^-./][^/]*$ ]] || fail "'$name' cannot be the name of a run"
  theirs=" ${extra[*]//_/-} " && theirs=${theirs// --no-/ --}
  for flag in --run-dir "${@:2}"; do # --idea and --no-idea are one flag, as are --a_b and --a-b
    flag=${flag%%=*} && flag=${flag/#--no-/--}
    [[ "$flag" != --* || "$theirs" != *" ${flag//_/-}"[\ =]* ]] ||
      fail "$flag is not yours to give: sweep.sh gives it"
  done
  case $doing in
    names) echo "$name" ;;
    unfinished) [ -e "$dir/result.json" ] || echo "$name" ;;
    list) printf '%q ' "${line[@]}" && echo ;;
    slurm) # a tab behind each word
      [[ ! -e "$dir/result.json" && "$queued" != *$'\t'"$dir"$'\t'* ]] || return 0
      printf '%s\t' "${line[@]}" && echo
      ;;
    here)
      slot=${#processes[@]}
      [ "$slot" != "$at_once" ] || wait_for_a_run
      [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
      names[slot]=$name began[slot]=$SECONDS
      [ ! -e "$dir/result.json" ] || began[slot]=before
      mkdir -p "$dir"
      echo "sweep.sh, $(date): ${line[*]}" >> "$dir/log.txt"
      set -m # a process group for each run: Ctrl-C is for this shell alone, which passes it on
      "${line[@]}" < /dev/null >> "$dir/log.txt" 2>&1 &
      set +m
      processes[slot]=$!
      ;;
  esac
}

wait_for_a_run() { # until one ends: sets its slot, which is free now, and says what came of it
  local name dir number news left='' code=0
  until false; do
    for slot in "${!processes[@]}"; do
      kill -0 "${processes[slot]}" || break 2
    done
    sleep 0.1
  done 2> /dev/null
  wait "${processes[slot]}" || code=$?
  unset "processes[slot]"
  name=${names[slot]} dir=runs/$sweep/${names[slot]}
  number='"([^"]+)": *(-?[0-9NI][^,}[:space:]]*)' # with its name; JSON knows NaN and Infinity, too
  if [[ "$code" = 0 && "$(cat "$dir/result.json")" =~ $number ]]; then
    measure=${BASH_REMATCH[1]}
    value=$(LC_ALL=C printf %.5g "${BASH_REMATCH[2]}")
    table+="$value $name"$'\n'
    news="$measure $value"
    [ "${began[slot]}" != before ] || news="was finished: $news"
  else # the last line of an error, or the first in the box of one, but not of an earlier try
    news=$(tr -d '\0' < "$dir/log.txt" | awk '
      /^╭/ { getline; gsub(/^│ *| *│$/, ""); print }
      /^(sweep.sh, |error: |[A-Za-z_.]*(Error|Exception))/' | tail -n 1)
    [[ "$news" != "sweep.sh, "* ]] || news="exit code $code"
    [[ "$code" -le 128 || "$code" -gt 159 ]] || news="killed by SIG$(kill -l "$code")"
    [ "$code" != 137 ] || news+=", as the system does when memory runs out"
    failed+=("$name, see $dir/log.txt: $news")
    news="FAILED: $news"
  fi
  ended=$((ended + 1))
  [ "${began[slot]}" = before ] || # a finished run takes no time worth counting
    trained=$((trained + 1)) spent=$((spent + SECONDS - began[slot]))
  [ "$trained" = 0 ] || left="  $(clock $((spent * (new - trained) / trained / at_once))) left"
  echo "$ended of $total  $name  $news$left"
}

# shellcheck disable=SC2317,SC2329
stop_runs() { # a trap: however this shell ends, no run is left behind
  set +e
  trap '' HUP INT QUIT TERM PIPE
  [ -n "$(jobs -rp)" ] || return 0
  echo "stopping: every run finishes its step and saves"
  for process in $(jobs -rp); do kill "$process"; done
  wait
  echo "stopped and saved; the same line resumes"
} 2> /dev/null

run_on_slurm() { # an array's list stays as it is while it waits: a grown grid gets a new one
  largest=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
  queued=$(squeue --me --noheader --array --format='%K %k' | while read -r i part; do
    [ ! -e "$part" ] || sed -n "${i}p" "$part"
  done)
  list=runs/$sweep/slurm-$(date +%Y%m%d-%H%M%S)-$$ sent=0 after=()
  mkdir -p "runs/$sweep"
  grid | split -l $((largest - 1)) - "$list-"
  for part in "$list-"*; do
    rows=$(wc -l < "$part")
    id=$(sbatch --parsable --job-name="$sweep" --array="1-$rows${JOBS:+%$JOBS}" \
      --comment="$part" --output="runs/$sweep/slurm-%A_%a.log" "${after[@]}" \
      "${sbatch_flags[@]}" slurm.sbatch "$part")
    echo "Submitted batch job $id"
    [ -z "${JOBS:-}" ] || after=(--dependency="afterany:$id")
    sent=$((sent + rows))
  done
  echo "$((total - sent)) of $total runs are finished or in the queue already"
}

fail() { echo "error: $*" >&2 && exit 1; }
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

main() { # read to its end before it begins, so that the file can be edited while it runs
  doing=here sbatch_flags=()
  case "${1:-}" in
    list | slurm) doing=$1 && shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    -* | '') ;;
    *) fail "what is $1? See bash sweep.sh --help" ;;
  esac
  while [[ "$doing $* " == slurm*" -- "* ]]; do sbatch_flags+=("$1") && shift; done # to the --
  extra=("$@")
  CDPATH='' cd "$(dirname "$0")"
  shopt -s nullglob # a pattern without files is none

  [[ "$best" = min || "$best" = max ]] || fail "best=$best is neither min nor max"
  script=${command[-1]}
  [[ "$script" != *.py || -e "$script" ]] || fail "there is no $script in $PWD"
  [[ ! -e "runs/$sweep/lock" && ! -e "runs/$sweep/config.json" ]] ||
    fail "runs/$sweep is a run itself: name another sweep= in sweep.sh"
  all_names=$(doing=names grid)
  total=$(wc -l <<< "$all_names")
  twice=$(sort <<< "$all_names" | uniq -d | head -n 1)
  [ -z "$twice" ] || fail "two runs are called $twice: each loop's value belongs in the name"

  [ "$doing" != list ] || { grid; exit; }
  [ "$doing" != slurm ] || { run_on_slurm; exit; }
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2> /dev/null || sysctl -n hw.ncpu)
  gpus=() all=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true)
  for gpu in $(tr , ' ' <<< "${CUDA_VISIBLE_DEVICES-$all}"); do
    [[ "$gpu" =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break # CUDA, too, ends its list at a -1
    gpus+=("$gpu")
  done
  at_once=${JOBS:-${#gpus[@]}}
  [[ "$at_once" =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "JOBS=$at_once is not a number"
  [ "$at_once" != 0 ] || at_once=$cores
  [ "$at_once" -le "$total" ] || at_once=$total
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > at_once ? cores / at_once : 1))}
  echo "$total runs, $at_once at a time; their logs: runs/$sweep/*/log.txt"

  trap stop_runs EXIT
  trap 'exit 130' HUP INT QUIT TERM PIPE
  SECONDS=0 ended=0 trained=0 spent=0 processes=() failed=() measure=result table=''
  new=$(doing=unfinished grid | wc -l)
  grid
  while [ ${#processes[@]} != 0 ]; do wait_for_a_run; done
  echo "$total runs, ${#failed[@]} failed, in $(clock $SECONDS); plot.ipynb draws runs/$sweep"
  if [ -n "$table" ]; then
    order=-g
    [ "$best" = min ] || order=-gr
    printf '%-10s %s\n' "$measure" "run, the best ($best) first"
    rows=$(printf '%s' "$table" | LC_ALL=C sort "$order" | while read -r value name; do
      mark=''
      for copy in "runs/$sweep/$name"/code/*/*.py; do # of each of its starts
        cmp -s "$copy" "$(dirname "$script")/${copy##*/}" || mark=" *"
      done
      printf '%-10s %s\n' "$value" "$name$mark"
    done)
    echo "$rows"
    # each setting over its seeds, where the names say seed1 and seed2
    awk '{ value = $1; sub(/^[^ ]+ +/, ""); sub(/-?seed[0-9]+/, "")
      if (!n[$0]++) first[$0] = value
      sum[$0] += value; last[$0] = value }
    END { for (s in n) if (n[s] > 1) printf "%-10.5g %s, mean of %d: %s to %s\n", \
      sum[s] / n[s], s, n[s], first[s], last[s] }' <<< "$rows" | LC_ALL=C sort "$order"
    [[ "$rows" != *" *"* ]] || echo "* trained by code that has changed"
  fi
  [ ${#failed[@]} = 0 ] || { printf 'FAILED     %s\n' "${failed[@]}" && exit 1; }
}

main "$@"; exit
