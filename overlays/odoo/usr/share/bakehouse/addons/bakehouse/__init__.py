from . import database, processes, sessions

database.patch()
processes.patch()
sessions.patch()
