-- Whether a running build has a node make its snapshot now.
alter table builds add column snapshotting boolean not null default false;
