"""The ClientApp: the same client updates and evaluations as in one process, on data of the node's own.

Flower starts a process for every message. What is slow to load stays in a process that outlives it (`warm`), unless the
node is configured otherwise; a simulation's processes outlive their messages themselves.
"""

import json
import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spryfl.errors import SpryError
from spryfl.runtime.flower.settings import own_data_of, partition_of, read_order
from spryfl.runtime.flower.wire import about_of, parcel_of, to_content
from spryfl.runtime.parcels import Parcel, failure_parcel

PRESENCE_SECONDS = 300.0
SLACK_SECONDS = 5.0
"""How much longer than its deadline a worker that does not stop itself is left alone."""


def client_app(config_file: Path) -> ClientApp:
    """A ClientApp of the run of a TOML file.

    A node's config says which client it is, partition-id=0, and may say where its own data lies, data='/path/file', and
    that nothing is to outlive a message, warm=false.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _reply(config_file, message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(config_file, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _reply(config_file, message, context)

    return app


def _reply(config_file: Path, message: Message, context: Context) -> Message:
    try:
        answer = _answer(config_file, message, context)
    except SpryError as error:
        answer = failure_parcel(str(error))
    return Message(to_content(answer), reply_to=message)


def _answer(config_file: Path, message: Message, context: Context) -> Parcel:
    order = read_order(config_file, context.run_config)
    parcel = parcel_of(message)
    asked = json.loads(parcel.header)
    is_task = asked["kind"] != "presence"
    data = own_data_of(context.node_config, order.config.partition.kind)
    simulated = "ray" in sys.modules  # then this process outlives the message itself, and stands for many clients
    header = {
        "file": str(order.file.resolve()),
        "overrides": order.overrides,
        "client": partition_of(context.node_config, order.num_clients),
        "data": data,
        "labels": json.loads(about_of(message))["labels"] if is_task else None,
        "shared": simulated and data is None,
        "task": parcel.header if is_task else None,
    }
    deadline = asked["deadline_seconds"] if is_task else PRESENCE_SECONDS
    work = Parcel(json.dumps(header), parcel.tensors)
    if not simulated and bool(context.node_config.get("warm", True)):
        from spryfl.runtime.flower.warm import ask

        return ask(work, None if deadline is None else deadline + SLACK_SECONDS)
    from spryfl.runtime.flower.performer import answer  # torch

    return answer(work)
