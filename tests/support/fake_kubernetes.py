"""A feigned cluster behind kubectl, and what Kubernetes and JobSet make of a manifest."""

import copy
import json
import pathlib
import re

import fake_cloud
import jsonschema
import yaml

_SCHEMA = pathlib.Path(__file__).parents[1] / "launch" / "jobset.schema.json"

# Keeps one JobSet: the manifest it was made from, and its state.
_FAKE_KUBECTL = """#!/bin/bash
printf '%s\\n' "$*" >>"$CLUSTER/calls"
while [[ $1 == --* ]]; do shift; done
case "$1 $2" in
  "create --filename=-")
    [ ! -f "$CLUSTER/jobset" ] || { echo "AlreadyExists" >&2; exit 1; }
    cat >"$CLUSTER/jobset"
    : >"$CLUSTER/state"
    ;;
  "get jobset")
    if [ -f "$CLUSTER/error" ]; then cat "$CLUSTER/error" >&2; exit 1; fi
    [ -f "$CLUSTER/jobset" ] || { echo 'jobsets "clip" not found (NotFound)' >&2; exit 1; }
    cat "$CLUSTER/state"
    ;;
  "get pods") echo "clip-slice-0-0-x2k4v Running" ;;
  "delete jobset") rm "$CLUSTER/jobset" || exit ;;
  "logs "*) echo "step 1/3 loss 3.7" ;;
  *) exit 64 ;;
esac
"""


class Cluster:
    """A cluster in a folder, which keeps one JobSet."""

    def __init__(self, folder: pathlib.Path, repository: pathlib.Path):
        self.folder, self.repository = folder, repository
        fake_cloud.executable(folder / "bin/kubectl", _FAKE_KUBECTL)
        (folder / "calls").touch()
        path = f"{folder / 'bin'}:{fake_cloud.environment()['PATH']}"
        self.env = fake_cloud.environment(PATH=path, CLUSTER=str(folder))

    def launch(self, arguments):
        return fake_cloud.launch(self.repository, arguments, self.env, program="launch/gke.sh")

    def ready(self, arguments):
        """Runs `launch`, which must succeed."""
        done = self.launch(arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def manifest(self) -> dict:
        return yaml.safe_load((self.folder / "jobset").read_text())


def _strict(schema):
    """Refuses fields that the schema does not know, as kubectl's strict validation does."""
    if isinstance(schema, dict):
        schema = {key: _strict(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
    return schema


def complaints(manifest: dict) -> list[str]:
    """Returns what JobSet's schema and the rules beside it refuse about a manifest."""
    schema = _strict(json.loads(_SCHEMA.read_text()))
    schema["properties"]["metadata"] = {
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            "labels": {"additionalProperties": {"type": "string"}},
            "annotations": {"additionalProperties": {"type": "string"}},
        },
    }
    found = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]
    if found:
        return found
    # What Kubernetes checks in its code: https://kubernetes.io/docs/concepts/workloads/controllers/job
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        if pod["restartPolicy"] != "Never":
            found.append("podFailurePolicy wants restartPolicy: Never")
        if job["completions"] != job["parallelism"]:
            found.append("all pods of a slice run at once")
        names = [container["name"] for container in pod["containers"]]
        for rule in job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and (codes["values"] != sorted(set(codes["values"])) or 0 in codes["values"]):
                found.append("values of onExitCodes: ascending, each once, 0 not with In or NotIn")
            if codes and not (len(codes["values"]) <= 255 and codes["containerName"] in names):
                found.append("onExitCodes: at most 255 values, of a container of the pod")
        last = f"{manifest['metadata']['name']}-{replicated['name']}-{replicated['replicas'] - 1}"
        if len(f"{last}-{job['completions'] - 1}-abcde") > 63:
            found.append("the names of the pods are longer than 63 letters")
    return found


def action(manifest: dict, exit_code: int, disrupted: bool = False) -> str:
    """Returns what JobSet does once a pod has failed.

    Kubernetes looks through the rules of podFailurePolicy, and JobSet through its own by the reason
    and the message of the failed Job: https://kubernetes.io/docs/tasks/job/pod-failure-policy and
    https://jobset.sigs.k8s.io/docs/tasks/failure_policy.
    """
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if "onPodConditions" in rule:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            fits, what = disrupted, "Pod default/clip-x has condition DisruptionTarget"
        else:
            codes = rule["onExitCodes"]
            fits = (exit_code in codes["values"]) == {"In": True, "NotIn": False}[codes["operator"]]
            what = f"Container main for pod default/clip-x failed with exit code {exit_code}"
        if fits:
            reason = "PodFailurePolicy"
            message = f"{what} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


def pods(manifest: dict) -> list[dict]:
    """Returns hostname, args and env of every pod, as Kubernetes starts them; slice by slice."""
    found = []
    name = manifest["metadata"]["name"]
    network = manifest["spec"]["network"]
    assert network["enableDNSHostnames"]
    for replicated in manifest["spec"]["replicatedJobs"]:
        for slice_index in range(replicated["replicas"]):
            job = replicated["template"]["spec"]
            for index in range(job["completions"]):
                annotations = {
                    "batch.kubernetes.io/job-completion-index": str(index),
                    "jobset.sigs.k8s.io/job-index": str(slice_index),
                }
                container = copy.deepcopy(job["template"]["spec"]["containers"][0])
                env: dict[str, str] = {}
                for variable in container["env"]:
                    if "value" in variable:
                        value = _expand(variable["value"], env)
                    else:
                        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                        value = annotations[
                            re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)[1]
                        ]
                    env[variable["name"]] = value
                found.append(
                    {
                        "hostname": f"{name}-{replicated['name']}-{slice_index}-{index}"
                        f".{network['subdomain']}",
                        "args": [_expand(word, env) for word in container["args"]],
                        "env": env,
                    }
                )
    return found


def _expand(text: str, env: dict[str, str]) -> str:
    """Puts in the variables as Kubernetes does: $$ is a dollar sign, unknown ones stay."""

    def put(match):
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", put, text)
