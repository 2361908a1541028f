# The answers to --help of launch/slurm.sh.
# shellcheck shell=bash

show_help() {
  case "$1" in
    "")
      cat <<'END'
Trains CLIP as a SLURM job, from a login node. Usage: launch/slurm.sh COMMAND [OPTION]...

  run      submits the job and follows its log; again with the same arguments, it resumes
  start    submits the job and returns
  status   shows the job's state, or how it ended, with the last line of its log
  logs     shows the log of all starts
  stop     ends the job; the run saves first

Options of all commands, with the environment variable or line in the file of --env that sets them:
  --name=NAME     the job's name, default clip; one run each        SBATCH_NAME
  --env=FILE      a file of lines such as SBATCH_NODES=2; options on the command line win
  --dry-run       prints the commands, quoted for a shell, and runs nothing

launch/slurm.sh COMMAND --help tells more; launch/README.md has a worked example.
END
      ;;
    run | start)
      echo "launch/slurm.sh $1 --nodes=2 --gpus-per-node=8 [OPTION]... -- --config=configs/vit_b32.py --workdir=/shared/runs/b32 ..."
      cat <<'END'

Submits a job that starts main.py with the arguments after -- and --coordinator=auto on every host,
and starts it again after a preemption, the time limit, a lost task or an error of storage. It ends
when the run has finished, fails by itself, or is stopped.
  --nodes=N            hosts, default 1                            SBATCH_NODES
  --gpus-per-node=N    GPUs of each host, also a100:8              SBATCH_GPUS_PER_NODE
  --cpus-per-task=N    cores of each host, with --mem=SIZE;        SBATCH_CPUS_PER_TASK, SBATCH_MEM
                       without it hosts are taken whole (--exclusive)
  --time=LIMIT         such as 1-00:00:00; at the limit the run    SBATCH_TIME
                       saves and goes back to the queue
  --partition=NAME, --account=NAME, --qos=NAME, --gres=LIST, --constraint=LIST
                       as sbatch takes them                        SBATCH_PARTITION, ...
  --sbatch-flag=FLAG   handed on to sbatch, such as --sbatch-flag=--exclude=node7; repeatable
  --grace=SECONDS      SIGTERM, on which the run saves, so long    SBATCH_GRACE
                       before the time limit, default 60
  --max-restarts=N         restarts in a row without a new checkpoint  SBATCH_MAX_RESTARTS
                       before the job ends, default 5
  --python=PATH        default .venv/bin/python, or python3        SBATCH_PYTHON
  --tasks-per-node=N   default 1, which drives all GPUs of its     SBATCH_TASKS_PER_NODE
                       host; more share them out
END
      ;;
    status)
      cat <<'END'
launch/slurm.sh status [--name=clip]

A job in the queue with its state, time and hosts, or why it waits; else how the run ended: finished,
failed with an exit status, stopped by SLURM (stop, scancel), or lost. start resumes the last two.
END
      ;;
    logs)
      cat <<'END'
launch/slurm.sh logs [--name=clip] [OPTION]...

The log runs/slurm/NAME.log holds all starts, the newest last. With several tasks, each line begins
with the number of its task.
  --lines=N    how many of the last lines, default 50
  --follow     continues until the job ends, or until Ctrl-C, which does not end the job
END
      ;;
    stop)
      cat <<'END'
launch/slurm.sh stop [--name=clip]

Cancels the job and returns once it is gone. main.py gets SIGTERM, on which it saves, and SIGKILL
after the cluster's KillWait (30 seconds by default). start with the same arguments resumes the run.
END
      ;;
    *) return 1 ;;
  esac
}
