# Runs in the background, for the scripts beside this file. They set JOBS, how many run at the same time, and LOGS, where
# their logs are, and define fail.
jobs=()
trap 'kill $(jobs -pr) 2> /dev/null || true; wait' EXIT # a stage that gets SIGTERM saves its state first
start() {  # LOG COMMAND…: in the background, at most JOBS at a time
    local log=$1
    shift
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    "$@" > "$log" 2>&1 < /dev/null &
    jobs+=("$! $log")
}
finish() {  # waits for all; where one failed, shows the end of its log
    local job failed=0
    for job in "${jobs[@]}"; do
        wait "${job%% *}" || { failed=1 && tail -n 3 "${job#* }" >&2; }
    done
    jobs=()
    [ $failed = 0 ] || fail "a run failed: see $LOGS/*.log"
}
