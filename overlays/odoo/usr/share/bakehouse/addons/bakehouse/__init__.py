from . import processes, sessions

processes.patch()
sessions.patch()
