"""A checkpoint of one layout and world size goes on in another as if nothing had happened.

The state of our optimizers is spread like its parameter, keyed by its name, and FP32; so torch's
distributed checkpoint can cut it anew.
"""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from gloo_ranks import Outcome, launch, successful
from parity_figures import difference, merged
from reshard_ranks import Leg, Route, travel, uninterrupted

LIMITS = {"fp32": 1e-6, "fp64": 1e-12, "bf16+master": 1e-6}  # ‖a - b‖ / ‖b‖ of the worst tensor

FSDP2 = (("FSDP2", 4), ("FSDP2", 2), ("FSDP2", 3))
ROUTES = [  # in every test run
    Route(FSDP2, "LAMB-clip", "fp64"),
    Route(FSDP2, "LAMB-fused", "bf16+master"),
    Route(FSDP2, "LARS", "bf16"),
    Route((("DDP", 2), ("FSDP2", 3)), "LAMB-clip", "fp32"),
    Route((("FSDP2+TP", 4), ("TP", 2), ("FSDP2", 3)), "LAMB-fused", "fp64"),
    Route((("ZeRO-redundancy", 2), ("ZeRO-redundancy", 3)), "LAMB-clip", "bf16+master"),
]
MORE_ROUTES = [
    Route(FSDP2, "AdamW", "fp32"),
    Route(FSDP2, "LAMB", "fp32"),
    Route(FSDP2, "LAMB", "bf16"),
    Route(FSDP2, "LARS", "fp32"),
    Route(FSDP2, "LARS-clip-fused", "fp64"),
    Route((("DDP", 2), ("FSDP2", 3)), "LARS", "bf16+master"),
    Route((("DDP", 2), ("FSDP2", 3)), "LAMB", "fp64"),
    Route((("HSDP", 4), ("FSDP2+ignored", 3)), "LAMB", "fp64"),
    Route((("FSDP2", 3), ("one-process", 1)), "LAMB", "bf16+master"),
    Route((("FSDP2+TP", 4), ("DDP", 2), ("one-process", 1)), "LARS-clip-fused", "fp32"),
]
each_route = pytest.mark.parametrize(
    "route", [*ROUTES, *(pytest.param(r, marks=pytest.mark.matrix) for r in MORE_ROUTES)], ids=str
)
WORLD_SIZES = (4, 2, 3, 1)  # in which every route passes them


@pytest.fixture(scope="module")
def outcomes_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Route], list[Sequence[Outcome]]]:
    """What each rank has found in each leg of a route. One launch per world size."""
    items = [item for item in request.session.items if item.module is request.module]
    routes = [item.callspec.params["route"] for item in items if hasattr(item, "callspec")]
    folder = tmp_path_factory.mktemp("reshard")
    legs = {}
    for index, route in enumerate(dict.fromkeys(routes)):
        own = folder / f"route{index}"
        own.mkdir()
        legs[route] = [Leg(route, number, own) for number in range(len(route.legs))]

    @functools.cache
    def launched() -> dict[int, list[dict[str, Outcome]]]:
        every = [leg for legs_of_route in legs.values() for leg in legs_of_route]
        return {
            world_size: launch(travel, here, world_size, folder)
            for world_size in WORLD_SIZES
            if (here := [leg for leg in every if leg.world_size == world_size])
        }

    def outcomes(route: Route) -> list[Sequence[Outcome]]:
        return [
            successful([found[str(leg)] for found in launched()[leg.world_size]])
            for leg in legs[route]
        ]

    return outcomes


@each_route
def test_a_checkpoint_goes_on_in_another_layout_and_world_size(
    route: Route, outcomes_of: Callable[[Route], list[Sequence[Outcome]]]
) -> None:
    *_, last = legs = outcomes_of(route)
    for leg in legs:
        assert all(outcome["unchanged"] for outcome in leg)
    figures = difference(route.cell(-1), last, uninterrupted(route))
    assert figures["ulps"] <= 1
    if route.precision != "bf16":
        assert figures["relative"] <= LIMITS[route.precision]


@each_route
def test_state_stays_fp32_in_a_checkpoint(
    route: Route, outcomes_of: Callable[[Route], list[Sequence[Outcome]]]
) -> None:
    dtype = torch.float64 if route.precision == "fp64" else torch.float32
    for leg in outcomes_of(route) if route.row != "AdamW" else ():
        state = {name: t for name, t in merged(leg, "tensors").items() if "/" in name}
        assert state
        assert ("kv/master_weight" in state) == (route.precision == "bf16+master")
        for name, tensor in state.items():
            assert tensor.dtype == (torch.float32 if name.endswith("/step") else dtype)
