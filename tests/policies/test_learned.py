import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from fakes import fleet, observation, pool, random_snapshot, snapshot
from onnx import TensorProto, helper, numpy_helper

from policies.action import ACTIONS, decode_action
from policies.contract import Observation, take_rows
from policies.learned import (
    FORMAT,
    MISS_PRICE_COLUMN,
    BundleMismatch,
    LearnedPolicy,
    Manifest,
    PolicyBundle,
    load_bundle,
    write_bundle,
)
from policies.observation import FEATURES, encode_miss_price
from policies.spec import InterfaceSpec, Slo, WindowSpec

Floats32 = npt.NDArray[np.float32]
F, A = len(FEATURES), len(ACTIONS)


def network(weights: Floats32, bias: Floats32, answers: int = 1) -> bytes:
    """clip(features @ weights + bias), written by hand; `answers` outputs of it."""
    constants = (weights, bias, np.array(-1, np.float32), np.array(1, np.float32))
    names = ("weights", "bias", "low", "high")
    outputs = ["actions", "again"][:answers]
    nodes = [helper.make_node("Gemm", ["features", "weights", "bias"], ["sum"])]
    nodes += [helper.make_node("Clip", ["sum", "low", "high"], [output]) for output in outputs]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", F])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", bias.size]) for output in outputs],
        [numpy_helper.from_array(value, name) for value, name in zip(constants, names, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def random_network(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return network(rng.normal(0, 0.2, (F, A)).astype(np.float32), rng.normal(0, 0.2, A).astype(np.float32))


def manifest(**overrides: Any) -> Manifest:
    interface = overrides.pop("interface", InterfaceSpec())
    values: dict[str, Any] = {
        "format": FORMAT,
        "interface": interface,
        "interface_digest": interface.digest(),
        "features": FEATURES,
        "actions": ACTIONS,
        "feature_low": (-1.0,) * F,
        "feature_high": (1.0,) * F,
        "log_miss_price": 3.0,
        "log_miss_price_span": 1.0,
        "provenance": {"seed": 1, "score": 0.1 + 0.2, "notes": ["ä", None]},
    }
    return Manifest(**{**values, **overrides})


def policy(weights: bytes, n: int = 1, **overrides: Any) -> LearnedPolicy:
    return LearnedPolicy(PolicyBundle(manifest(**overrides), weights, "0" * 64), fleet(n=n), InterfaceSpec())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "policy.zip"
    write_bundle(path, manifest(), random_network())
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)


def refusal(path: Path) -> str:
    """The message that a bundle is refused with: one line that names the file."""
    with pytest.raises(BundleMismatch) as caught:
        load_bundle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.zip"
    written = manifest()
    weights = random_network()
    digest = write_bundle(path, written, weights)
    loaded = load_bundle(path)
    assert loaded.manifest == written
    assert loaded.weights == weights
    assert loaded.digest == digest
    assert list(path.parent.iterdir()) == [path]


def test_equal_bundles_are_equal_bytes_and_other_ones_have_another_digest(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "a", manifest(), b"weights")
    assert write_bundle(tmp_path / "b", manifest(), b"weights") == first
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert write_bundle(tmp_path / "c", manifest(), b"weightz") != first
    assert write_bundle(tmp_path / "d", manifest(log_miss_price=3.1), b"weights") != first


def test_truncation_at_every_length_is_refused(bundle: Path) -> None:
    whole = bundle.read_bytes()
    for length in range(len(whole)):
        bundle.write_bytes(whole[:length])
        refusal(bundle)


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_flip_of_any_byte_is_refused(bundle: Path, mask: int) -> None:
    whole = bundle.read_bytes()
    for index in range(len(whole)):
        bundle.write_bytes(whole[:index] + bytes([whole[index] ^ mask]) + whole[index + 1 :])
        refusal(bundle)
    bundle.write_bytes(whole)
    load_bundle(bundle)


def test_added_bytes_are_refused(bundle: Path) -> None:
    whole = bundle.read_bytes()
    for content in (whole + b"\0", b"\0" + whole, whole + whole):
        bundle.write_bytes(content)
        refusal(bundle)


def test_the_same_contents_packed_by_someone_else_are_refused(bundle: Path) -> None:
    members = list(members_of(bundle).items())
    pack(bundle, members)
    load_bundle(bundle)
    pack(bundle, members[::-1])
    assert "byte for byte" in refusal(bundle)


def test_bytes_cut_out_of_the_middle_are_refused(bundle: Path) -> None:
    whole = bundle.read_bytes()
    for start in range(0, len(whole) - 8, 97):
        bundle.write_bytes(whole[:start] + whole[start + 8 :])
        refusal(bundle)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such policy bundle" in refusal(tmp_path / "absent.zip")
    refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"plain text", random_network(), b"PK\x05\x06" + bytes(18)])
def test_files_that_are_no_bundles_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "policy.zip"
    path.write_bytes(content)
    refusal(path)


def test_missing_and_extra_and_doubled_members_are_refused(bundle: Path) -> None:
    members = list(members_of(bundle).items())
    pack(bundle, members[:1])
    assert "expected the members" in refusal(bundle)
    pack(bundle, [*members, ("data.pkl", b"cos\nsystem\n(S'true'\ntR.")])
    assert "data.pkl" in refusal(bundle)
    with pytest.warns(UserWarning, match="Duplicate name"):
        pack(bundle, [*members, members[1]])
    assert "expected the members" in refusal(bundle)
    pack(bundle, [(f"member-{index}", b"") for index in range(5000)])
    assert len(refusal(bundle)) < 500


@pytest.mark.parametrize("digest", ["0" * 64, "", None, 7])
def test_another_digest_is_refused(bundle: Path, digest: object) -> None:
    members = members_of(bundle)
    text = {**json.loads(members["manifest.json"]), "digest": digest}
    pack(bundle, [("manifest.json", json.dumps(text).encode()), ("policy.onnx", members["policy.onnx"])])
    assert "digest" in refusal(bundle)


def test_repacked_with_an_altered_manifest_or_other_weights_is_refused(bundle: Path) -> None:
    members = members_of(bundle)
    text = {**json.loads(members["manifest.json"]), "log_miss_price": 9.0}
    pack(bundle, [("manifest.json", json.dumps(text).encode()), ("policy.onnx", members["policy.onnx"])])
    assert "digest" in refusal(bundle)
    pack(bundle, [("manifest.json", members["manifest.json"]), ("policy.onnx", random_network(1))])
    assert "digest" in refusal(bundle)


@pytest.mark.parametrize("text", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_mapping_is_refused(bundle: Path, text: bytes) -> None:
    pack(bundle, [("manifest.json", text), ("policy.onnx", b"")])
    refusal(bundle)


def test_a_compressed_member_is_refused_without_unpacking_it(bundle: Path) -> None:
    size = 256 << 20
    with (
        zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("manifest.json", "w") as member,
    ):
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr("policy.onnx", b"")
    assert bundle.stat().st_size < size / 50
    tracemalloc.start()
    try:
        assert "compressed" in refusal(bundle)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 10


def test_a_huge_file_is_refused_without_reading_all_of_it(bundle: Path) -> None:
    with bundle.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: nothing is written
    assert "larger than any policy bundle" in refusal(bundle)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"format": FORMAT + 1}, "bundle format 2"),
        ({"features": (*FEATURES[1:], FEATURES[0])}, "other features or actions"),
        ({"actions": ACTIONS[::-1]}, "other features or actions"),
        ({"interface_digest": "0" * 64}, "interface does not match"),
    ],
)
def test_a_bundle_for_something_else_is_refused(bundle: Path, overrides: dict[str, Any], expected: str) -> None:
    write_bundle(bundle, manifest(**overrides), random_network())
    assert expected in refusal(bundle)


def test_another_format_is_named_even_with_other_fields(bundle: Path) -> None:
    write_bundle(bundle, manifest().model_copy(update={"format": 2, "feature_low": (0.0,)}), b"weights")
    assert "bundle format 2" in refusal(bundle)


@pytest.mark.parametrize(
    "overrides",
    [
        {"feature_low": (0.0,)},
        {"feature_high": (float("nan"),) * F},
        {"log_miss_price": float("inf")},
        {"log_miss_price_span": -1.0},
    ],
)
def test_ranges_that_make_no_sense_are_refused(bundle: Path, overrides: dict[str, Any]) -> None:
    write_bundle(bundle, manifest().model_copy(update=overrides), random_network())
    assert re.search("manifest field|is no number", refusal(bundle))


def test_another_interface_is_refused_by_name_of_the_file(bundle: Path) -> None:
    other = InterfaceSpec(window=WindowSpec(control_interval_s=30.0))
    with pytest.raises(
        BundleMismatch, match="trained for a decision every 15 s, but control_interval_s is 30 s"
    ) as caught:
        LearnedPolicy(load_bundle(bundle), fleet(), other)
    assert str(caught.value).startswith(f"{bundle}: ")
    LearnedPolicy(load_bundle(bundle), fleet(), InterfaceSpec())  # its own is welcome


@pytest.mark.parametrize(
    "weights",
    [
        network(np.full((F, A), np.nan, np.float32), np.zeros(A, np.float32)),
        network(np.zeros((F, A), np.float32), np.full(A, np.nan, np.float32)),
        network(np.zeros((F, 2), np.float32), np.zeros(2, np.float32)),
        network(np.zeros((F, A), np.float32), np.zeros(A, np.float32), answers=2),
        random_network()[:-50],
        b"no network",
    ],
    ids=["NaN weights", "NaN bias", "two actions", "two outputs", "cut short", "text"],
)
def test_a_network_that_cannot_be_run_is_refused_in_one_line(bundle: Path, weights: bytes) -> None:
    write_bundle(bundle, manifest(), weights)
    with pytest.raises(BundleMismatch) as caught:
        LearnedPolicy(load_bundle(bundle), fleet(), InterfaceSpec())
    assert str(caught.value).startswith(f"{bundle}: ")
    assert "\n" not in str(caught.value)


def test_outputs_are_those_of_the_network() -> None:
    rng = np.random.default_rng(1)
    weights, bias = rng.normal(0, 0.3, (F, A)).astype(np.float32), rng.normal(0, 0.3, A).astype(np.float32)
    features = rng.uniform(-2, 2, (500, F)).astype(np.float32)
    outputs = policy(network(weights, bias)).outputs(features)
    assert outputs == pytest.approx(np.clip(features.astype(float) @ weights + bias, -1, 1), abs=1e-5)
    assert (np.abs(outputs) == 1.0).any()
    assert (np.abs(outputs) < 1.0).any()


def random_observation(rng: np.random.Generator, n: int) -> Observation:
    services = fleet(n=n)
    seen = observation(random_snapshot(rng, services, 100.0), rng.uniform(0.5, 12.0, (n, 1)))
    seen.features[:] = rng.uniform(-2, 2, (n, F))
    return seen


def test_many_services_get_what_each_alone_would_get() -> None:
    n = 40
    wide = policy(random_network(), n)
    alone = [policy(random_network()) for _ in range(n)]
    for tick in range(5):
        seen = random_observation(np.random.default_rng(tick), n)
        target = wide.propose(seen)
        for row, single in enumerate(alone):
            rest = {name: getattr(seen, name)[[row]] for name in Observation.__slots__ if name != "snapshot"}
            wish = single.propose(Observation(snapshot=take_rows(seen.snapshot, np.array([row])), **rest))
            assert wish.replicas[0].tolist() == target.replicas[row].tolist()
            assert wish.batch_cap[0].tolist() == target.batch_cap[row].tolist()
    assert len(np.unique(target.replicas)) > 3


def dial_network() -> bytes:
    """Headroom is half of the miss-price feature, the rest is the reference."""
    weights = np.zeros((F, A), np.float32)
    weights[MISS_PRICE_COLUMN, 0] = 0.5
    return network(weights, np.zeros(A, np.float32))


def proposed(learned: LearnedPolicy, attained: float, windows: int) -> int:
    target = None
    for _ in range(windows):
        target = learned.propose(observation(snapshot(ttft_attainment=attained), demand=4.0))
    assert target is not None
    return int(target.replicas[0, 0])


def test_misses_move_the_dial_up_to_the_trained_span_and_calm_moves_it_down() -> None:
    start = proposed(policy(dial_network(), log_miss_price_span=0.0), 1.0, 1)
    calm = proposed(policy(dial_network()), 1.0, 600)
    burning = proposed(policy(dial_network()), 0.0, 600)
    assert calm < start < burning
    for wish, dial in ((start, 3.0), (calm, 2.0), (burning, 4.0)):
        action = np.array([[0.5 * encode_miss_price(np.array(dial)), 0.0, 0.0, 0.0]])
        reference = observation(snapshot(), demand=4.0)
        expected = decode_action(action, reference, fleet(), InterfaceSpec().action)
        assert wish == expected.replicas[0, 0]


@pytest.mark.parametrize(("target", "price"), [(0.9, 8.0), (0.95, 16.0), (0.99, 80.0), (0.999, 90.0)])
def test_the_dial_starts_where_all_allowed_misses_cost_the_same(target: float, price: float) -> None:
    services = fleet(pool(max_replicas=500), slo=Slo(ttft_s=2.0, tpot_s=0.05, attainment=target))
    trained = PolicyBundle(manifest(log_miss_price_span=9.0), dial_network(), "0" * 64)
    learned = LearnedPolicy(trained, services, InterfaceSpec())
    seen = observation(snapshot(ttft_attainment=np.nan, tpot_attainment=np.nan), demand=40.0)
    action = np.array([[0.5 * encode_miss_price(np.log(price)), 0.0, 0.0, 0.0]])
    expected = decode_action(action, seen, services, InterfaceSpec().action)
    assert learned.propose(seen).replicas.tolist() == expected.replicas.tolist()


def test_the_dial_stays_where_it_was_trained() -> None:
    """Trained at prices far above the highest, it starts and stays at its lowest."""
    for attained in (1.0, 0.0):
        far = proposed(policy(dial_network(), log_miss_price=7.0, log_miss_price_span=1.0), attained, 300)
        lowest = proposed(policy(dial_network(), log_miss_price=6.0, log_miss_price_span=0.0), 1.0, 1)
        assert far == lowest


def test_the_dial_replaces_the_feature_and_leaves_the_observation_alone() -> None:
    seen = observation(snapshot(), demand=4.0)
    seen.features[:] = 0.7
    before = seen.features.copy()
    learned = policy(dial_network(), log_miss_price=1.0, log_miss_price_span=0.0)
    action = np.array([[0.5 * encode_miss_price(np.array(1.0)), 0.0, 0.0, 0.0]])
    expected = decode_action(action, seen, fleet(), InterfaceSpec().action)
    assert learned.propose(seen).replicas.tolist() == expected.replicas.tolist()
    assert (seen.features == before).all()


def test_reset_returns_the_dial_of_the_masked_services_only() -> None:
    learned = policy(dial_network(), 2)
    calm = observation(snapshot(2, ttft_attainment=1.0), demand=4.0)
    for _ in range(320):
        moved = learned.propose(calm).replicas
    learned.reset(np.array([True, False]))
    fresh = policy(dial_network(), 2).propose(calm).replicas
    assert fresh[0, 0] > moved[0, 0]
    assert learned.propose(calm).replicas[:, 0].tolist() == [fresh[0, 0], moved[1, 0]]


def test_distance_counts_the_widths_outside_the_training_range() -> None:
    low, high = np.full(F, -1.0), np.full(F, 1.0)
    low[1], high[1] = 0.5, 0.5  # never moved in training: a width of 0.1 is assumed
    learned = policy(random_network(), feature_low=tuple(low), feature_high=tuple(high))
    features = np.zeros((5, F), np.float32)
    features[:, 1] = 0.5
    features[1, 2] = 2.0  # half of the width of 2 above
    features[2, 3] = -5.0  # two widths below
    features[3, 1] = 0.6
    features[4, MISS_PRICE_COLUMN] = 50.0  # the dial is the policy's own
    assert learned.distance(features) == pytest.approx([0.0, 0.5, 2.0, 1.0, 0.0], abs=1e-5)


def test_loading_and_running_needs_neither_torch_nor_pickle(bundle: Path) -> None:
    code = """
import pickle, sys
from pathlib import Path
def refuse(*args, **kwargs):
    raise AssertionError("unpickled something")
pickle.loads = pickle.load = pickle.Unpickler = refuse
import numpy as np
from policies.fleet import Fleet
from policies.learned import LearnedPolicy, load_bundle
from policies.observation import FEATURES
from policies.spec import InterfaceSpec
policy = LearnedPolicy(load_bundle(Path(sys.argv[1])), Fleet.empty(2, 1), InterfaceSpec())
assert policy.outputs(np.zeros((2, len(FEATURES)), np.float32)).shape == (2, 4)
loaded = {"torch", "onnx", "stable_baselines3", "gymnasium", "numba", "mlflow"} & set(sys.modules)
print(f"loaded: {sorted(loaded)}")
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "loaded: []"


def test_no_member_of_a_bundle_is_a_pickle(bundle: Path) -> None:
    members = members_of(bundle)
    json.loads(members["manifest.json"])
    onnx.load(io.BytesIO(members["policy.onnx"]))
    assert len(members) == 2
