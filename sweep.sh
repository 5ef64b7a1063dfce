#!/usr/bin/env bash
# A grid of runs: does Muon beat AdamW when each has its best learning rate?
#   bash sweep.sh              here, in parallel: one run per GPU, or per core without GPUs (JOBS=4 bash sweep.sh: four)
#   bash sweep.sh slurm        on the cluster, as a job array of slurm.sbatch
#   bash sweep.sh list         only print the command lines
#   bash sweep.sh --steps 50   these flags go to every run
# Run again: finished runs are skipped, interrupted ones resume, failed ones are tried again, new ones are added.
set -euo pipefail
cd "$(dirname "$0")"
mode=here
case "${1:-}" in
  list | slurm) mode=$1 && shift ;;
  -h | --help) grep '^#   ' sweep.sh && exit ;;
esac
extra=$([ $# = 0 ] || printf ' %q' "$@")

sweep=muon-or-adamw # its folder in runs/, and its group in wandb
grid() {            # one more dimension: one more loop, its value in --run-dir, and its flag
  for optimizer in muon adamw; do
    for lr in 1e-3 3e-3 1e-2 3e-2 1e-1; do
      for seed in 1 2; do
        echo "python train.py --run-dir runs/$sweep/$optimizer-lr$lr-seed$seed --wandb-group $sweep" \
          "--optimizer $optimizer --lr $lr --seed $seed --steps 80 --eval-every 20$extra"
      done
    done
  done
}

[ "$mode" != list ] || { grid && exit; }
list=runs/$sweep/runs.txt
[ "$mode" = here ] || list=runs/$sweep/slurm-$(date +%s).txt # a waiting array keeps its rows when the grid grows
mkdir -p "runs/$sweep"
grid > "$list"
total=$(wc -l < "$list")
if [ "$mode" = slurm ]; then
  exec sbatch --job-name="$sweep" --array="1-$((total))" --output="logs/%x-%A_%a.log" slurm.sbatch "$list"
fi

# here: as many slots as GPUs, or as cores; each takes a row that no other has taken, until there are no more
cores=$(nproc 2> /dev/null || sysctl -n hw.ncpu)
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -x '[0-9]*' | paste -sd, -)}"
slots=${JOBS:-$((${#gpus[@]} ? ${#gpus[@]} : cores))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > slots ? cores / slots : 1))}
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
touch "$state/trained" "$state/failed"

slot() {
  local line log row=0
  trap 'kill "$!" 2> /dev/null; wait; exit' TERM
  [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
  while read -r line; do
    row=$((row + 1))
    mkdir "$state/$row" 2> /dev/null || continue # another slot has it
    log=${line#*--run-dir } log=${log%% *}/log.txt
    mkdir -p "${log%/*}"
    bash -c "exec $line" < /dev/null >> "$log" 2>&1 &
    if wait "$!"; then
      if tail -n 1 "$log" | grep -q "is finished"; then
        progress "$log" "$(tail -n 2 "$log" | sed -n '/^note:/s/.*/(by older code)/p; $s/.*is finished:/was finished:/p' | paste -sd' ' -)"
      else
        echo "$log" >> "$state/trained"
        progress "$log" "$(grep -o 'val_loss: .*' "$log" | tail -n 1)"
      fi
    else
      echo "$log" | tee -a "$state/trained" >> "$state/failed"
      progress "$log" "FAILED: $(tail -n 1 "$log")"
    fi
  done < "$list"
}

progress() { # a line as a run ends: n of N, name, final loss, time left
  local ended trained
  echo "$1" >> "$state/ended"
  ended=$(grep -nxF "$1" "$state/ended" | cut -d: -f1) trained=$(wc -l < "$state/trained")
  local running=$((total - ended < slots ? total - ended : slots - 1)) # taken to be half done
  local halves=$((2 * trained + running))
  local left=$((SECONDS * (2 * (total - ended) - running) / (halves ? halves : 1)))
  printf '%d of %d  %s  %s  %d:%02d left\n' "$ended" "$total" "$(basename "${1%/*}")" "$2" $((left / 60)) $((left % 60))
}

echo "$total runs, $slots at a time; their logs: runs/$sweep/*/log.txt"
pids=() SECONDS=0
trap 'trap "" INT TERM; kill "${pids[@]}" 2> /dev/null; wait; echo "stopped and saved; the same line resumes"; exit 130' INT TERM # no orphans
for ((i = 0; i < slots; i++)); do
  slot "$i" &
  pids+=("$!")
done
wait
printf '%d runs, %d failed, in %d:%02d; plot.ipynb draws them\n' "$total" "$(wc -l < "$state/failed")" $((SECONDS / 60)) $((SECONDS % 60))
if [ -s "$state/failed" ]; then
  sed 's/^/failed, see /' "$state/failed"
  exit 1
fi
