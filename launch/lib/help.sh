# The answers to --help.
# shellcheck shell=bash

show_help() {
  case "$1" in
    "")
      cat <<'END'
Trains CLIP on Cloud TPU VMs, from a machine with gcloud. Usage: launch/tpu.sh COMMAND [OPTION]...

  create   asks Google Cloud for a TPU: one slice or several, spot or reserved
  wait     waits until the TPU is there
  setup    sends the committed code to every worker and installs what it needs
  start    starts main.py on every worker, in the background
  logs     shows a worker's log
  status   shows the TPU's state and, for every worker, the run's
  stop     ends main.py on every worker
  delete   gives the TPU back, which ends its costs
  run      create, wait, setup, start and follow in one; --watch outlives preemptions

Options of all commands, with the environment variable or line in the file of --env that sets them:
  --name=NAME       the TPU's name                                 TPU_NAME
  --zone=ZONE       such as us-east5-b                             TPU_ZONE
  --project=ID      default: gcloud's                              PROJECT
  --type=TYPE       such as v5litepod-256, v6e-64, v5p-128         TPU_TYPE
  --slices=N        slices of that type, default 1                 TPU_SLICES
  --env=FILE        a file of lines such as TPU_NAME=clip; options on the command line win
  --dry-run         prints the commands, quoted for a shell, and runs nothing

launch/tpu.sh COMMAND --help tells more; launch/README.md has a worked example.
END
      ;;
    create)
      cat <<'END'
launch/tpu.sh create --name=clip --zone=us-east5-b --type=v5litepod-256 [OPTION]...

Files a queued resource request for the TPU and returns; with --wait, once the TPU is there.
  --slices=N           several slices of this type, joined over the data-centre network
  --spot               cheap capacity that Google can take back at any time (see run --watch)
  --reserved           capacity that your project has reserved
  --runtime=IMAGE      the VM image, default by type: v2-alpha-tpuv5-lite (v5litepod),
                       v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e), tpu-ubuntu2204-base (older);
                       also TPU_RUNTIME
  --create-flag=FLAG   handed on to gcloud, such as --create-flag=--service-account=ADDRESS; repeatable
  --wait               returns when the TPU is there
END
      ;;
    wait)
      cat <<'END'
launch/tpu.sh wait --name=clip --zone=us-east5-b

Asks every minute (TPU_POLL seconds) and returns when the TPU is there; fails if its request does.
END
      ;;
    setup)
      cat <<'END'
launch/tpu.sh setup --name=clip --zone=us-east5-b [--ref=REF]

Sends the repository as committed (git archive) to every worker of every slice, makes a virtual
environment there and installs requirements.txt and jax[tpu]. Safe to run again, to send new code or
after a failure; refuses while main.py runs.
  --ref=REF   the branch, tag or commit to send, default HEAD
END
      ;;
    start)
      cat <<'END'
launch/tpu.sh start --name=clip --zone=us-east5-b -- --config=configs/vit_l14.py --workdir=gs://bucket/run1 ...

Starts main.py with the arguments after -- and --coordinator=auto on every worker of every slice, in
the background; refuses if one of them still runs it or lacks the config. Started again with the
same arguments, the run resumes from its last checkpoint.
END
      ;;
    logs)
      cat <<'END'
launch/tpu.sh logs --name=clip --zone=us-east5-b [OPTION]...

  --worker=N   which worker of the slice, default 0
  --slice=N    which slice, default 0
  --lines=N    how many of the last lines, default 50
  --follow     continues until the run ends, or until Ctrl-C, which does not end the run
END
      ;;
    status)
      cat <<'END'
launch/tpu.sh status --name=clip --zone=us-east5-b

The state of the request, and a line for each worker: running, finished, failed, stopped, lost (the
machine was restarted, or main.py was killed, missed another worker or its storage: run --watch starts
it again) or idle, with the last line of its log.
END
      ;;
    stop)
      cat <<'END'
launch/tpu.sh stop --name=clip --zone=us-east5-b

Sends SIGTERM to main.py on every worker, which saves a checkpoint and ends; what is left after two
minutes gets SIGKILL. No run --watch starts it again; start with the same arguments resumes. The TPU
stays.
END
      ;;
    delete)
      cat <<'END'
launch/tpu.sh delete --name=clip --zone=us-east5-b [--yes]

Deletes the TPU with its disks, or the request if the TPU is not there yet. What lies in the bucket
stays. Asks first, unless --yes.
END
      ;;
    run)
      cat <<'END'
launch/tpu.sh run --name=clip --zone=us-east5-b --type=v5litepod-256 [OPTION]... -- --config=configs/vit_l14.py --workdir=gs://bucket/run1 ...

Creates the TPU unless it exists, waits for it, sets it up, starts main.py and follows the log. Run
the same command again to resume where it was interrupted. Takes create's options (but --wait), and:
  --ref=REF   the commit to send, default HEAD
  --watch     instead of the log, watches the run until it is over (asking every TPU_POLL seconds,
              default 60); when the TPU is preempted, deletes it, creates it again and starts the
              same command, which resumes from its last checkpoint. Keep the terminal open, or use nohup or tmux
  --max-restarts=N   with --watch: a run that is lost, although its TPU is there, is started again
              until this happened N times in a row (default 5), each within 20 minutes of the start.
              A preemption does not count
  --delete    deletes the TPU when the run has finished, failed or been stopped, or was given up
END
      ;;
    *) return 1 ;;
  esac
}
