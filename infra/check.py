#!/usr/bin/env python
"""Check every file of infra/ with the tool of its own world, without a cluster or a cloud: `make infra-check`.

Shell scripts: shellcheck. Dockerfile: hadolint. Kubernetes: kustomize builds each folder, and what it builds is held
against Kubernetes' schemas and, for a RayJob, rayjob.schema.json; root file systems are read-only, the network closed.
SkyPilot: Task.from_yaml. CloudFormation: cfn-lint, each role's prefix, then a stack is created in moto.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = "1.34"  # the version whose schemas apply
PREFIXES = ("${Bucket.Arn}/stores/*", "${Bucket.Arn}/runs/${!aws:PrincipalTag/kubernetes-service-account}/*")
BIN = Path(sys.executable).parent


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent, help="default: infra/")
    parser.add_argument("--only", choices=sorted(CHECKS), help="one kind of file")
    arguments = parser.parse_args()
    problems = 0
    for name, check in CHECKS.items():
        if arguments.only in (None, name):
            for subject, found in check(arguments.folder):
                print(f"{'FAULT' if found else 'ok':<6} {name:<15} {subject}", flush=True)
                print(found, end="\n" if found else "")
                problems += bool(found)
    sys.exit(f"error: {problems} file(s) with faults" if problems else 0)


def shell(folder: Path) -> Iterator[tuple[str, str]]:
    """Every script that SLURM's users start."""
    for path in sorted((folder / "slurm").iterdir()):
        yield path.name, _output("shellcheck", "--external-sources", "--source-path", str(folder.parent), str(path))


def dockerfile(folder: Path) -> Iterator[tuple[str, str]]:
    """The image."""
    yield "Dockerfile", _output("hadolint", str(folder / "Dockerfile"))


def kubernetes(folder: Path) -> Iterator[tuple[str, str]]:
    """The base and each overlay, as kustomize builds them."""
    root = folder / "kubernetes"
    for path in [root / "base", *sorted((root / "overlays").iterdir())]:
        name = str(path.relative_to(root))
        built = subprocess.run([BIN / "kubectl", "kustomize", path], check=False, capture_output=True, text=True)
        if built.returncode:
            yield name, built.stderr
            continue
        for document in yaml.safe_load_all(built.stdout):
            found = _manifest(document, root) or _locked(document)
            yield f"{name}: {document['kind']} {document['metadata']['name']}", found
        if "kind: NetworkPolicy" not in built.stdout:
            yield f"{name}: network", "there is no NetworkPolicy"


def _locked(document: dict[str, Any]) -> str:
    """What a container of a manifest may do that it should not."""
    if document["kind"] == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    else:
        pods = [document["spec"]["template"]["spec"]] if document["kind"] == "Job" else []
    for container in (container for pod in pods for container in pod["containers"]):
        context = container.get("securityContext", {})
        if not context.get("readOnlyRootFilesystem") or context.get("allowPrivilegeEscalation") is not False:
            return f"container {container['name']} can write its root file system, or gain privileges\n"
    return ""


def _manifest(document: dict[str, Any], root: Path) -> str:
    import jsonschema
    import kubernetes_validate

    try:
        if document["kind"] == "RayJob":
            jsonschema.validate(document, json.loads((root / "rayjob.schema.json").read_text(encoding="utf-8")))
            cluster = document["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                pod = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": "pod"},
                    "spec": group["template"]["spec"],
                }
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return f"{error.json_path}: {error.message}"
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    return ""


def skypilot(folder: Path) -> Iterator[tuple[str, str]]:
    """Each task, read as `sky jobs launch` reads it; secrets get a value as from the command line."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    home = os.environ["HOME"]
    with tempfile.TemporaryDirectory() as scratch:  # SkyPilot writes to the home folder
        os.environ["HOME"] = scratch
        import sky

        for path in sorted((folder / "skypilot").glob("*.yaml")):
            try:
                config = yaml.safe_load(path.read_text(encoding="utf-8"))
                secrets = [(name, "given") for name in config.get("secrets") or {}]
                os.chdir(folder.parent)  # workdir is relative to where the command is given
                task = sky.Task.from_yaml_config(config, secrets_overrides=secrets)
                found = _script(str(task.setup)) + _script(str(task.run))
            except (ValueError, sky.exceptions.InvalidSkyPilotConfigError, yaml.YAMLError) as error:
                found = str(error)
            yield path.name, found
    os.environ["HOME"] = home


def _script(text: str) -> str:
    """A task's shell commands; SkyPilot runs them in bash."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        return _output("shellcheck", "--shell=bash", "--exclude=SC1091,SC2086", file.name)


def cloudformation(folder: Path) -> Iterator[tuple[str, str]]:
    """The template's text, then whether its stack comes up, with and without its conditions."""
    path = folder / "aws" / "storage.yaml"
    found = _output("cfn-lint", str(path)) or _prefixes(path.read_text(encoding="utf-8"))
    yield "storage.yaml (cfn-lint, prefixes)", found
    if not found:
        yield "storage.yaml (stack)", _stack(path.read_text(encoding="utf-8"), {"BucketName": "check-a"})
        more = {"BucketName": "check-b", "EksCluster": "check", "StoreDays": "30"}
        yield "storage.yaml (stack on EKS)", _stack(path.read_text(encoding="utf-8"), more)


def _prefixes(template: str) -> str:
    """Statements that let a role write or delete outside its own prefix, or in another role's."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    yaml.add_multi_constructor("!", lambda loader, _, node: getattr(node, "value", None), loader)
    owners: dict[str, str] = {}
    for name, resource in yaml.load(template, loader)["Resources"].items():
        for policy in resource["Properties"].get("Policies", []):
            for statement in policy["PolicyDocument"]["Statement"]:
                actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
                changes = any(
                    fnmatch(name, action) for name in ("s3:PutObject", "s3:DeleteObject") for action in actions
                )
                if statement["Effect"] != "Allow" or not changes:
                    continue
                prefix = str(statement["Resource"])
                if prefix not in PREFIXES or owners.setdefault(prefix, name) != name:
                    return f"{name} may write {prefix}, which is not its own prefix\n"
    return ""


def _stack(template: str, parameters: dict[str, str]) -> str:
    import boto3
    import botocore.exceptions
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "check"
    os.environ.pop("AWS_ENDPOINT_URL", None)
    with mock_aws():
        client = boto3.client("cloudformation", region_name="us-east-1")
        given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
        try:
            client.create_stack(
                StackName="check", TemplateBody=template, Parameters=given, Capabilities=["CAPABILITY_NAMED_IAM"]
            )
            (stack,) = client.describe_stacks(StackName="check")["Stacks"]
            bucket = boto3.client("s3", region_name="us-east-1")
            bucket.head_bucket(Bucket=parameters["BucketName"])
        except (botocore.exceptions.ClientError, KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if stack["StackStatus"] == "CREATE_COMPLETE" else f"the stack is {stack['StackStatus']}"


def _output(tool: str, *arguments: str) -> str:
    """What a tool that says nothing about a good file says; it stands beside this Python."""
    done = subprocess.run([BIN / tool, *arguments], check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"{tool} ended with {done.returncode}"


CHECKS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "shell": shell,
    "dockerfile": dockerfile,
    "kubernetes": kubernetes,
    "skypilot": skypilot,
    "cloudformation": cloudformation,
}

if __name__ == "__main__":
    main()
