#!/usr/bin/env bash
# A grid of runs: does Muon beat AdamW when each has its best learning rate?
#   bash sweep.sh                here, a run per GPU, or per core (JOBS=4 bash sweep.sh: four)
#   bash sweep.sh --steps 50     these flags go to every run
#   bash sweep.sh list           only print the command lines
#   bash sweep.sh table          only print the results so far, the best first
#   bash sweep.sh slurm          on the cluster, as job arrays (JOBS=4: at most four runs at once)
#   bash sweep.sh slurm --partition=gpu -- --steps 50     what stands before -- goes to sbatch
# Again: finished runs are skipped, interrupted ones resume, failed ones are tried again.
set -euo pipefail

sweep=muon-or-adamw       # its folder in runs/, and its group in wandb
command=(python train.py) # or (python mine.py), (uv run python train.py), (env A=1 python train.py)
best=min                  # which end of the first measure is best: min or max
common=(--steps 80)       # flags of every run; the next three keep a short run short
common+=(--eval-every 80 --sample-tokens 0)

grid() { # a dimension is a loop, its value in the name, and its flag
  for optimizer in muon adamw; do
    for lr in 1e-3 3e-3 1e-2 3e-2 1e-1; do
      for seed in 1 2; do
        run "$optimizer-lr$lr-seed$seed" --optimizer "$optimizer" --lr "$lr" --seed "$seed"
      done
    done
  done
}

main() { # read to its end before it begins, so that the file can be edited while it runs
  mode=here
  case "${1:-}" in
    list | table | slurm) mode=$1 && shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    -* | '') ;;
    *) fail "what is $1? See bash sweep.sh --help" ;;
  esac
  sbatch_flags=()
  if [[ "$mode" = slurm && " $* " == *" -- "* ]]; then
    while [ "$1" != -- ]; do sbatch_flags+=("$1") && shift; done
    shift
  fi
  extra=("$@")
  cd "$(dirname "$0")"

  names=() flags=() firsts=() counts=()
  grid
  twice=$(printf '%s\n' "${names[@]}" | sort | uniq -d | head -n 1)
  [ -z "$twice" ] || fail "two runs are called $twice: each loop's value belongs in the name"
  for word in "${command[@]}"; do
    [[ "$word" != *.py || -e "$word" ]] || fail "there is no $word in $PWD"
  done
  for word in "${flags[@]}" "${common[@]}" "${extra[@]}"; do
    [[ "$word" != --run[-_]dir* ]] || fail "--run-dir is not yours to give: it is the run's name"
  done

  case $mode in
    here) run_here ;;
    slurm) run_on_slurm ;;
    table) print_table ;;
    list) for i in "${!names[@]}"; do row "$i" && printf '%q ' "${line[@]}" && echo; done ;;
  esac
}

fail() {
  echo "error: $*" >&2
  exit 1
}

run() { # a run's name and its own flags, from the grid: kept until all runs are known
  [[ "$1" =~ ^[^-./[:cntrl:]][^/[:cntrl:]]*$ ]] || fail "'$1' cannot be the name of a run"
  names+=("$1")
  firsts+=("${#flags[@]}")
  counts+=("$(($# - 1))")
  flags+=("${@:2}")
}

row() { # sets the dir and the command line of run number $1
  dir=runs/$sweep/${names[$1]}
  line=("${command[@]}" --run-dir "$dir" --wandb-group "$sweep" "${common[@]}")
  line+=("${flags[@]:${firsts[$1]}:${counts[$1]}}" "${extra[@]}")
}

result() { # sets measure and value: the first in the result.json of the run in dir
  measure='' value=''
  [ -e "$dir/result.json" ] || return 0
  [[ "$(< "$dir/result.json")" =~ \"([^\"]+)\":\ *([^,}[:space:]]+) ]] || return 0
  measure=${BASH_REMATCH[1]}
  value=$(LC_ALL=C printf '%.5g' "${BASH_REMATCH[2]}")
}

print_table() {
  local ranked='' others='' heading=result order=-g
  [ "$best" = min ] || order=-gr
  for i in "${!names[@]}"; do
    row "$i" && result
    if [ -n "${failed[i]:-}" ]; then
      others+="FAILED     ${names[i]}, see $dir/log.txt: ${failed[i]}"$'\n'
    elif [ -z "$value" ]; then
      others+="-          ${names[i]}, not finished"$'\n'
    else
      ranked+="$(printf '%-10s %s' "$value" "${names[i]}")"$'\n'
      heading=$measure
    fi
  done
  printf '%-10s %s\n' "$heading" "run, the best ($best) first"
  printf '%s' "$ranked" | LC_ALL=C sort "$order"
  printf '%s' "$others"
}

run_here() { # a pipe holds a token for each free slot: a run takes one, and puts it back with news
  total=${#names[@]} ended=0 todo=0 trained=0 spent=0 failed=() finished=()
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2> /dev/null || sysctl -n hw.ncpu)
  gpus=() all=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true)
  all=${CUDA_VISIBLE_DEVICES-$all}
  for gpu in ${all//,/ }; do # as CUDA reads it: up to the first that is none, such as -1
    [[ "$gpu" =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
    gpus+=("$gpu")
  done
  slots=${JOBS:-${#gpus[@]}}
  [[ "$slots" =~ ^[0-9]+$ ]] || fail "JOBS=$slots is not a number"
  [ "$slots" != 0 ] || slots=$cores
  [ "$slots" -le "$total" ] || slots=$total
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > slots ? cores / slots : 1))}
  for i in "${!names[@]}"; do
    row "$i"
    if [ -e "$dir/result.json" ]; then finished[i]=yes; else todo=$((todo + 1)); fi
  done
  echo "$total runs, $slots at a time; their logs: runs/$sweep/*/log.txt"

  pipe=$(mktemp -u) && mkfifo "$pipe" && exec 3<> "$pipe" && rm "$pipe"
  for ((i = 0; i < slots; i++)); do echo "$i" >&3; done
  trap stop_runs EXIT
  trap 'exit 130' HUP INT QUIT TERM PIPE
  SECONDS=0
  for i in "${!names[@]}"; do
    next_slot
    row "$i"
    set -m # a process group for each run: Ctrl-C is for this shell alone, which passes it on
    start "$i" &
    set +m
  done
  for ((i = 0; i < slots; i++)); do next_slot; done
  printf '%d runs, %d failed, in %d:%02d; plot.ipynb draws them\n' \
    "$total" "${#failed[@]}" $((SECONDS / 60)) $((SECONDS % 60))
  print_table
  [ ${#failed[@]} = 0 ]
}

start() { # in the background, in slot: run number $1, until its end
  local process='' stopped='' code=0 begun=$SECONDS
  trap 'stopped=yes; [ -z "$process" ] || kill "$process"' TERM
  [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
  mkdir -p "$dir"
  exec >> "$dir/log.txt" 2>&1 < /dev/null
  echo "sweep.sh, $(date): ${line[*]}"
  "${line[@]}" 3>&- &
  process=$!
  [ -z "$stopped" ] || kill "$process" # the signal came before there was a process
  wait "$process" || code=$?
  [ -z "$stopped" ] || wait "$process" || true # the signal has ended the first wait
  echo "$slot $1 $code $((SECONDS - begun))" >&3
}

next_slot() { # waits for a token and sets slot; a token that was used before brings news of a run
  local row='' code seconds news left=''
  read -r slot row code seconds <&3
  [ -n "$row" ] || return 0
  dir=runs/$sweep/${names[row]}
  result
  news="$measure $value"
  if [ "$code" != 0 ]; then
    failed[row]=$(why "$code")
    news="FAILED: ${failed[row]}"
  elif [ -n "${finished[row]:-}" ]; then
    news="was finished: $news"
  fi
  ended=$((ended + 1))
  [ -n "${finished[row]:-}" ] || trained=$((trained + 1)) spent=$((spent + seconds))
  if [ "$trained" != 0 ]; then
    seconds=$((spent * (todo - trained) / trained / slots))
    left=$(printf '  %d:%02d left' $((seconds / 60)) $((seconds % 60)))
  fi
  echo "$ended of $total  ${names[row]}  $news$left"
}

why() { # the run in dir ended with code $1: by a signal, or by its last line of error
  local text
  text=$(tr -d '\0' < "$dir/log.txt" | awk '
    /^sweep.sh, / { text = last = ""; next } # here begins the last try
    /^╭/ { box = NR + 1 } # in which tyro complains of a flag
    NR == box { gsub(/^│ *| *│$/, ""); text = $0 }
    /^(error: |stopped by |[A-Za-z_.]*(Error|Exception))/ { text = $0 }
    /[^ ]/ { last = $0 }
    END { print text ? text : last }')
  if [ "$1" -gt 128 ] && [[ "$text" != "stopped by "* ]]; then
    text="killed by SIG$(kill -l $(($1 - 128)))"
    [ "$1" != 137 ] || text+=", as the system does when memory runs out"
  fi
  echo "$text"
}

# shellcheck disable=SC2329
stop_runs() { # a trap: however this shell ends, no run is left behind
  trap '' HUP INT QUIT TERM PIPE
  local process running
  running=$(jobs -rp)
  [ -n "$running" ] || return 0
  echo "stopping: every run finishes its step and saves" || true
  for process in $running; do kill "$process" || true; done
  wait
  echo "stopped and saved; the same line resumes" || true
} 2> /dev/null

run_on_slurm() { # an array's list stays as it is while it waits: a grown grid gets a new one
  command -v sbatch > /dev/null || fail "there is no sbatch here"
  largest=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
  queued=$(squeue --me --noheader --array --format='%k %K' | while read -r part i; do
    [ ! -e "$part" ] || sed -n "${i}p" "$part"
  done)
  list=runs/$sweep/slurm-$(date +%Y%m%d-%H%M%S)-$$ sent=0
  mkdir -p "runs/$sweep"
  for i in "${!names[@]}"; do
    row "$i"
    [[ "${line[*]}" != *[$'\t\n']* ]] || fail "a tab or a new line in a flag of ${names[i]}"
    [[ ! -e "$dir/result.json" && "$queued" != *$'\t'"$dir"$'\t'* ]] || continue
    printf '%s\t' "${line[@]}" && echo
    sent=$((sent + 1))
  done > "$list"
  echo "$((${#names[@]} - sent)) of ${#names[@]} runs are finished or in the queue already"
  split -a 3 -l $((largest - 1)) "$list" "$list-"
  rm "$list"
  after=()
  for part in "$list-"*; do
    [ -e "$part" ] || continue
    id=$(sbatch --parsable --job-name="$sweep" --array="1-$(wc -l < "$part")${JOBS:+%$JOBS}" \
      --comment="$part" --output="runs/$sweep/slurm-%A_%a.log" "${after[@]}" \
      "${sbatch_flags[@]}" slurm.sbatch "$part")
    echo "Submitted batch job $id"
    [ -z "${JOBS:-}" ] || after=(--dependency="afterany:$id")
  done
}

main "$@"; exit
