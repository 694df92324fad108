-- What nodes have to say of sessions.

-- The last message of the session's log, by its number, that became an event: the same notice again is none.
alter table sessions add column noted bigint not null default 0;
