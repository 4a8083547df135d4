from . import database, mail, printing, processes, sessions

database.patch()
mail.patch()
printing.patch()
processes.patch()
sessions.patch()
