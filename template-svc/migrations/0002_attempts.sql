-- How often a builder has taken it: one at which builders die must not be taken for ever.
alter table builds add column attempts integer not null default 0;
