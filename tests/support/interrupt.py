"""A simulation that is interrupted after some rounds."""


def interrupted_after(rounds):
    """An ``on_event`` that interrupts when so many rounds are done."""

    def on_event(event):
        if event["kind"] == "round" and event["round"] == rounds:
            raise KeyboardInterrupt

    return on_event
