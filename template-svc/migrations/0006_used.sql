-- When a step, or what builds keep for themselves, was last of use: what is of none for long is forgotten.
alter table build_steps add column use_time bigint not null default 0;
update build_steps set use_time = create_time;
create index build_steps_unused on build_steps (use_time);
