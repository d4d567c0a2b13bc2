# shellcheck shell=bash
# The scripts of this folder source this file: it starts the ranks of a SLURM job, passes signals on to them, and puts
# the job back into the queue where a run has saved and is to go on. `make slurm-test` runs all of it.
#
#   run_ranks PROGRAM [FLAGS]   run PROGRAM with python on all tasks of the job. Returns where it has finished;
#                               ends the script where it failed, or where the job goes back into the queue.
#
# RUN           folder of the run, on a disk that all nodes share; the output of start n is in $RUN/logs/<job>.<n>.log
# MAX_RESTARTS  restarts of a job after which it is not requeued again (default: 100)
# MASTER_ADDR, MASTER_PORT   where ranks meet (default: the first node; a port from the numbers of job and restart)
# LAUNCH        command that starts the ranks instead of srun; without SLURM, for trials
#
# How a job ends:
# - SLURM sends USR1 to the batch shell before the time limit (#SBATCH --signal=B:USR1@seconds), TERM at scancel; where
#   preempt_send_user_signal is set, USR1 at a preemption. The shell passes it on to the ranks, as TERM, which all
#   programs understand.
# - A training run then says "stopping after iteration N" and "saved checkpoint of iteration N", and ends with code 0. It
#   ends with 0 as well when all iterations are done; so these lines in the log decide, not the code.
# - tools/ablate.py ends with code 75 when there is more to do.
# - Ranks that the signal itself has ended (143) had nothing to save: a training run before its first step, a
#   conversion, preprocessing, which keeps its finished parts. They begin again, or go on.
# In these three cases the job is requeued, unless a user has cancelled it. Any other code is the job's: 1 failed, 2 a
# mistake in flags or files, 137 killed. A failure would only repeat itself, so it is not requeued.

if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# A rank that fails is not followed at once by a kill: the others need seconds to find and name it, and end then.
SRUN_OPTIONS=(--kill-on-bad-exit=0 --wait=300)

asked=0
pass_on() {  # to the processes of all steps, not to this shell
    asked=1
    echo "asked to stop by SIG$1 at $(date +%T)"
    scancel --signal=TERM "$SLURM_JOB_ID"
}

run_ranks() {
    if [[ -n ${LAUNCH:-} ]]; then
        $LAUNCH "$@" || exit
        return
    fi
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        echo "there is no SLURM job here, expected one; submit the script with sbatch, or set LAUNCH" >&2
        exit 2
    fi
    local restart=${SLURM_RESTART_COUNT:-0} job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} log first step code limit before
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    job+=${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    log=$RUN/logs/$job.$restart.log
    mkdir -p "$RUN/logs" || exit 1
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
    fi
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((15000 + (31 * SLURM_JOB_ID + 7 * restart) % 15000))}
    limit=$(end_of_job)
    echo "start $restart of job $job on $SLURM_JOB_NODELIST at $(date '+%F %T'), log: $log"

    before=$(stat -c %s "$log" 2>/dev/null) || before=0
    # A signal that has come by now found no ranks, and no other one will.
    if ((asked)); then : >>"$log" && finish "$log" "$before" 143 "$restart" "$limit"; fi
    srun "${SRUN_OPTIONS[@]}" --open-mode=append --output="$log" python "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a trapped signal ends `wait` early, with its own code
    trap '' USR1 TERM  # from here on a signal must not end this shell before it has requeued the job
    wait "$step"
    code=$?
    finish "$log" "$before" "$code" "$restart" "$limit"
}

end_of_job() {  # the time limit in seconds since 1970; a far one where there is none, or SLURM does not answer
    local end
    end=$(SLURM_TIME_FORMAT=standard squeue -h -j "$SLURM_JOB_ID" -o %e)
    # of an empty text, date makes the last midnight
    if [[ -z $end ]] || ! date -d "$end" +%s 2>/dev/null; then echo 9999999999; fi
}

# The log of the ranks and its size before they wrote, their exit code, the number of restarts so far, the time limit in
# seconds since 1970.
finish() {
    local log=$1 before=$2 code=$3 restart=$4 limit=$5 why= state
    if ((code == 0)); then
        why=$(tail -c "+$((before + 1))" "$log" | grep -a -o 'stopping after iteration [0-9]*' | tail -n 1)
        if [[ -n $why ]] && ! grep -a -q "saved checkpoint of iteration ${why##* } " "$log"; then
            echo "$why, but no checkpoint of it was saved; not requeued" >&2
            exit 75
        fi
    elif ((code == 75)); then
        why="the program has more to do"
    elif ((asked && code == 143)); then
        why="ended by the signal"
    fi
    if [[ -z $why ]]; then
        if ((code == 0)); then return; fi
        tail -n 5 "$log"
        echo "failed with exit code $code, not requeued; all output: $log"
        exit "$code"
    fi
    # A job that SLURM is ending is COMPLETING: cancelled, on a node that failed (SLURM requeues it then), or over its time
    # limit. Only the time tells the last from the others.
    state=$(scontrol show job "$SLURM_JOB_ID")  # nothing where SLURM does not answer: then requeueing is tried
    if [[ -n $state && $state != *JobState=RUNNING* ]] && (($(date +%s) < limit)); then
        echo "$why; SLURM is ending the job (cancelled, or a node failed), so it is not requeued from here"
        exit "$code"
    fi
    if ((restart >= ${MAX_RESTARTS:-100})); then
        echo "$why; not requeued after $restart restarts (MAX_RESTARTS); submit again to go on" >&2
        exit 75
    fi
    echo "$why; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    exit "$code"
}
