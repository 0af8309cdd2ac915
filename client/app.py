"""The installed Flower ClientApp: one visit per message. The worker runs it; nothing that a server sends replaces it."""

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load, save

from fedtailor import tree, wire
from fedtailor.client.work import Work
from fedtailor.tree import Tree
from fedtailor.wire import Visit

Perform = Callable[[Visit, Tree], Work]


def client_app(perform: Perform) -> ClientApp:
    """A ClientApp around what this site does in a visit."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visit = wire.parse_head(Visit, str(message.content.config_records["head"]["json"]))
        cast = tree.unflatten(load(message.content.array_records["payload"][wire.STYPE].data))
        work = perform(visit, cast)
        payload = save({name: leaf.contiguous() for name, leaf in tree.flatten(work.summand).items()})
        return Message(wire.record(work.report, payload), reply_to=message)

    return app
