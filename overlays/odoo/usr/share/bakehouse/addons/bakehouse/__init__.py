from . import database, printing, processes, sessions

database.patch()
printing.patch()
processes.patch()
sessions.patch()
