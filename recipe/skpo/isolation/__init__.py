"""Runs that cannot touch each other, and whose ports serve nobody else.  Knows nothing of SKPO.

``run.isolated`` wraps a run in the command's process.  ``worker.set_up`` does its part in every process that Ray starts
for the run, and vLLM's processes inherit the environment from there.

| module     | what it keeps apart                                                                    |
|------------|----------------------------------------------------------------------------------------|
| folder     | sockets, Ray's session, temporary files: one folder per run, open to its owner alone    |
| receiver   | weight sync: the socket is in that folder, on the receiver's side                       |
| messages   | TransferQueue: every message is signed with a key of the run, or not even decoded       |
| http_guard | vLLM's HTTP server: no answer without the key of its process                            |
"""
