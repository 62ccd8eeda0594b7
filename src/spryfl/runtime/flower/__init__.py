"""Clients on other machines, over Flower: the only place that knows it.

    server_app.py   the ServerApp: the same rounds, with clients on a grid
    client_app.py   the ClientApp: the same client update
    runtime.py      the Runtime: tasks to nodes, answers back
    presence.py     which node holds which partition, from one session to the next
    performer.py    what a client does with a message
    warm.py         a process that outlives messages, so that torch and the model are loaded once
    settings.py     a run's configuration from an app's folder and Flower's run config

A client is its partition id, which its node's configuration states; node ids differ from run to run.
"""
