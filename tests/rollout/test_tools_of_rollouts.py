"""The tools that each rollout gets, without a trainer: those of the run, and those of its environment."""

from types import SimpleNamespace

import pytest
import torch
from conftest import add

from trl_toolgrpo.errors import ConfigError
from trl_toolgrpo.rollout.tools_of_rollouts import RolloutTools
from trl_toolgrpo.tools.mcp.config import MCPServer
from trl_toolgrpo.trl_hooks import Run


class Shelf:
    """An environment with a tool of its own."""

    def __init__(self):
        self.kept = []

    def reset(self, fails=False):
        if fails:
            raise TimeoutError("the shelf did not answer")
        return "empty"

    def put(self, item: str) -> int:
        """
        Keep an item.

        Args:
            item: its name.
        """
        self.kept.append(item)
        return len(self.kept)


@pytest.fixture
def make():
    """Make the tools of a run and what stands in for its trainer, as TRL's constructor would have left it."""
    made = []

    def build(tools=None, environment_factory=None, count=0, recording=True):
        args = SimpleNamespace(
            num_generations=2, max_concurrent_tools=2, tool_timeout=5.0, tool_retries=0, environment_timeout=5.0
        )
        trainer = SimpleNamespace(
            args=args, recording=recording, environments=None, environment_factories=None, _metrics={},
            model=SimpleNamespace(training=True), accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        )  # fmt: skip
        trainer._metrics["train"] = {"environments/failures": []}
        found = RolloutTools(Run(trainer), tools, environment_factory, None)
        made.append(found)
        trainer.tools = list(found.for_trl)
        if environment_factory is not None:
            trainer.environments = [found.environment_factory() for _ in range(count)]
            trainer.environment_factories = {None: found.environment_factory}
            trainer._environment_pool = {None: list(trainer.environments)}
            found.read_environments()
        return found, trainer

    yield build
    for tools in made:
        if tools.executor is not None:
            tools.executor.shutdown()


def test_a_run_without_tools_has_plain_rollouts(make):
    tools, _ = make()
    assert not tools.has_tools and tools.for_trl == [] and tools.servers == {}
    (request,) = tools.requests([[1, 2]])
    assert request.prompt_ids == [1, 2] and request.tools == {} and request.environment is None and not request.failed


def test_each_rollout_gets_the_tools_of_the_run(make):
    tools, trainer = make([add])
    assert tools.has_tools and [tool.__name__ for tool in tools.for_trl] == ["add"]
    requests = tools.requests([[1], [2]])
    assert all(request.tools["add"].function(2, 3) == 5 and not request.owned for request in requests)
    scores = torch.ones(2, 1)
    assert tools.without_failed(scores) is scores and trainer._metrics["train"]["environments/failures"] == []


def test_each_rollout_gets_the_tools_of_its_own_environment(make):
    tools, trainer = make([add], Shelf, count=2)
    first, second = tools.requests([[1], [2]])
    assert set(first.tools) == {"add", "put"} and first.owned == {"put"}
    assert first.environment is trainer.environments[0] and second.environment is trainer.environments[1]
    assert [first.tools["put"].function(item=item) for item in "ab"] == [1, 2]
    assert second.tools["put"].function(item="c") == 1
    assert [tool.__name__ for tool in trainer.tools] == ["add", "put"]


def test_an_environment_that_fails_is_out_of_rollouts_rewards_and_the_pool(make):
    tools, trainer = make([add], Shelf, count=3)
    for place, environment in enumerate(trainer.environments):
        environment.reset(fails=place == 1)
    requests = tools.requests([[1], [2], [3]])
    assert [request.failed for request in requests] == [False, True, False]
    assert requests[1].environment is None and not requests[1].owned
    scores = tools.without_failed(torch.ones(3, 2))
    assert scores.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert tools.lost.tolist() == [False, True, False] and trainer._metrics["train"]["environments/failures"] == [1.0]
    tools.take_back()
    assert trainer._environment_pool == {None: [trainer.environments[0], trainer.environments[2]]}
    assert not any(request.failed for request in tools.requests([[1], [2], [3]])), "a failure is of one batch"


def test_trls_own_rollouts_get_callables_and_no_executor(make):
    tools, _ = make([add], recording=False)
    assert tools.executor is None and tools.for_trl == [add]


def test_a_server_for_each_rollout_needs_recorded_rollouts():
    trainer = SimpleNamespace(
        args=SimpleNamespace(num_generations=2, max_concurrent_tools=2, tool_timeout=5.0, tool_retries=0),
        recording=False,
    )
    server = MCPServer(name="own", command="true", per_rollout=True)
    with pytest.raises(ConfigError, match="MCP server 'own' with `per_rollout=True` and rollouts of TRL's own"):
        RolloutTools(Run(trainer), None, None, [server])
