//! What is said about names: questions and answers, and what the rules make of them. No I/O.
//!
//! Messages are read and written anew in both directions, so that the guest and a name server cannot read one message differently.

use std::{io, net::Ipv4Addr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, RecordType},
};

use crate::slot::{
    firewall::mark_of,
    rules::{NamePattern, NetworkRules, Rule},
};

/// What guests and name servers may send by UDP; RFC 6891 6.2.5 for guests that do not say.
const LARGEST: u16 = 4096;
const SMALLEST: u16 = 512;
/// Names of one answer that are followed, and addresses of it that are opened.
const CHAIN: usize = 16;
const ADDRESSES: usize = 64;
/// The guest may keep an answer for so long, in seconds.
const LONGEST: u32 = 3600;

/// A session's rules, as far as they speak of names.
#[derive(Debug)]
pub(in crate::slot) struct Policy {
    /// What holds for names that no rule speaks of.
    internet: bool,
    /// With the mark of the connections each lets through.
    allow: Vec<(NamePattern, u32)>,
    deny: Vec<NamePattern>,
}

/// What is done with a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is passed on; the firewall knows what to do with the addresses.
    PassOn,
    /// It is passed on, and the addresses are opened under this mark.
    Open(u32),
    /// It is not passed on.
    Withhold,
}

impl Policy {
    pub(in crate::slot) fn new(rules: &NetworkRules) -> Self {
        let names = |list: &[Rule]| -> Vec<(NamePattern, u32)> {
            list.iter()
                .filter_map(|rule| match rule {
                    Rule::Name(pattern) => Some((pattern.clone(), mark_of(rule))),
                    Rule::Net(_) => None,
                })
                .collect()
        };
        Self {
            internet: rules.internet,
            allow: names(&rules.allow),
            deny: names(&rules.deny)
                .into_iter()
                .map(|(pattern, _)| pattern)
                .collect(),
        }
    }

    pub(super) fn judge(&self, question: &Question) -> Verdict {
        let name = &question.query.name;
        let allowed = self
            .allow
            .iter()
            .find(|(pattern, _)| pattern.matches(name.iter()));
        match allowed {
            Some((_, mark)) => Verdict::Open(*mark),
            // A question is a way out too: one that is not allowed tells the world nothing.
            None if !self.internet || self.denies(name) => Verdict::Withhold,
            None => Verdict::PassOn,
        }
    }

    fn denies(&self, name: &Name) -> bool {
        self.deny.iter().any(|pattern| pattern.matches(name.iter()))
    }

    /// Whether an answer leads by another name to a denied one.
    pub(super) fn withholds(&self, answer: &Answer) -> bool {
        answer.0.answers.iter().any(|record| {
            self.denies(&record.name)
                || matches!(&record.data, RData::CNAME(to) if self.denies(&to.0))
        })
    }
}

/// A guest's question.
#[derive(Debug)]
pub(super) struct Question {
    message: Message,
    query: Query,
}

/// A name server's answer to it.
#[derive(Debug)]
pub(super) struct Answer(Message);

impl Question {
    /// Reads a message; an error is the answer to it, if it deserves one.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Option<Vec<u8>>> {
        let Ok(message) = Message::from_vec(bytes) else {
            return Err(None);
        };
        let metadata = message.metadata;
        if metadata.message_type != MessageType::Query {
            return Err(None);
        }
        let refuse = |code| {
            let answer = Message::error_msg(metadata.id, metadata.op_code, code);
            Err(answer.to_vec().ok())
        };
        if metadata.op_code != OpCode::Query {
            return refuse(ResponseCode::NotImp);
        }
        let [query] = message.queries.as_slice() else {
            return refuse(ResponseCode::FormErr);
        };
        if query.query_class != DNSClass::IN
            || matches!(query.query_type, RecordType::AXFR | RecordType::IXFR)
        {
            return refuse(ResponseCode::Refused);
        }
        let query = query.clone();
        Ok(Self { message, query })
    }

    /// As it is sent to a name server: nothing but the question itself.
    pub(super) fn to_server(&self, id: u16) -> io::Result<Vec<u8>> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = self.message.metadata.checking_disabled;
        message.add_query(self.query.clone());
        if let Some(asked) = &self.message.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(self.largest());
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            message.set_edns(edns);
        }
        message.to_vec().map_err(io::Error::other)
    }

    /// Reads what a name server sent, if it is the answer to this question.
    pub(super) fn answer(&self, id: u16, bytes: &[u8]) -> Option<Answer> {
        let message = Message::from_vec(bytes).ok()?;
        let is_it = message.metadata.id == id
            && message.metadata.message_type == MessageType::Response
            && matches!(message.queries.as_slice(), [query]
                if query.name == self.query.name && query.query_type == self.query.query_type);
        is_it.then_some(Answer(message))
    }

    fn largest(&self) -> u16 {
        self.message
            .edns
            .as_ref()
            .map_or(SMALLEST, |edns| edns.max_payload().clamp(SMALLEST, LARGEST))
    }

    /// Bytes the guest takes by UDP.
    pub(super) fn udp_limit(&self) -> usize {
        usize::from(self.largest())
    }

    /// An answer without records.
    pub(super) fn refusal(&self, code: ResponseCode) -> Option<Vec<u8>> {
        let mut answer = self.empty();
        answer.metadata.response_code = code;
        answer.to_vec().ok()
    }

    fn empty(&self) -> Message {
        let metadata = self.message.metadata;
        let mut answer = Message::response(metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.metadata.checking_disabled = metadata.checking_disabled;
        answer.add_query(self.query.clone());
        if let Some(asked) = &self.message.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(LARGEST);
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            answer.set_edns(edns);
        }
        answer
    }

    /// The answer as the guest gets it: what is longer than it takes, or was longer than we do, it asks for again by TCP.
    pub(super) fn pass_on(&self, answer: Answer, limit: usize) -> Option<Vec<u8>> {
        let Answer(from_server) = answer;
        let mut whole = self.empty();
        whole.metadata.response_code = from_server.metadata.response_code;
        whole.metadata.authentic_data = from_server.metadata.authentic_data;
        if !from_server.metadata.truncation {
            whole.answers = from_server.answers;
            whole.authorities = from_server.authorities;
            whole.additionals = from_server.additionals;
            let sections = [
                &mut whole.answers,
                &mut whole.authorities,
                &mut whole.additionals,
            ];
            for record in sections.into_iter().flatten() {
                record.ttl = record.ttl.min(LONGEST);
            }
            let bytes = whole.to_vec().ok()?;
            if bytes.len() <= limit {
                return Some(bytes);
            }
        }
        whole.truncate().to_vec().ok()
    }
}

impl Answer {
    /// The addresses of the name that was asked for, directly or by other names, and how long each holds.
    pub(super) fn addresses(&self) -> Vec<(Ipv4Addr, Duration)> {
        let Some(query) = self.0.queries.first() else {
            return Vec::new();
        };
        if self.0.metadata.truncation {
            return Vec::new();
        }
        let mut names = vec![&query.name];
        let mut next = 0;
        while let Some(name) = names.get(next).copied() {
            next += 1;
            for record in &self.0.answers {
                if let RData::CNAME(to) = &record.data
                    && record.name == *name
                    && names.len() < CHAIN
                    && !names.contains(&&to.0)
                {
                    names.push(&to.0);
                }
            }
        }
        self.0
            .answers
            .iter()
            .filter(|record| names.contains(&&record.name))
            .filter_map(|record| match &record.data {
                RData::A(address) => Some((
                    address.0,
                    Duration::from_secs(record.ttl.min(LONGEST).into()),
                )),
                _ => None,
            })
            .take(ADDRESSES)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{
        Record,
        rdata::{A, CNAME},
    };
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn ask(text: &str) -> Question {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name(text), RecordType::A));
        Question::read(&message.to_vec().unwrap()).unwrap()
    }

    fn policy(internet: bool, allow: &[&str], deny: &[&str]) -> Policy {
        let texts = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let rules = NetworkRules::parse(internet, &texts(allow), &texts(deny), 0, 0).unwrap();
        Policy::new(&rules)
    }

    fn answer(question: &Question, records: Vec<Record>) -> Answer {
        let mut message = Message::response(9, OpCode::Query);
        message.add_query(question.query.clone());
        message.answers = records;
        question.answer(9, &message.to_vec().unwrap()).unwrap()
    }

    fn address(of: &str, last: u8, ttl: u32) -> Record {
        Record::from_rdata(name(of), ttl, RData::A(A::new(192, 0, 2, last)))
    }

    fn alias(of: &str, to: &str) -> Record {
        Record::from_rdata(name(of), 60, RData::CNAME(CNAME(name(to))))
    }

    #[test]
    fn allow_goes_before_deny_and_deny_before_the_rest() {
        let open = policy(true, &["ok.example.com."], &["*.example.com"]);
        assert!(matches!(
            open.judge(&ask("OK.example.com.")),
            Verdict::Open(_)
        ));
        assert_eq!(open.judge(&ask("no.example.com.")), Verdict::Withhold);
        assert_eq!(open.judge(&ask("example.com.")), Verdict::PassOn);
        let closed = policy(false, &["ok.example.com."], &[]);
        assert_eq!(closed.judge(&ask("example.com.")), Verdict::Withhold);
    }

    #[test]
    fn each_name_has_its_own_mark() {
        let two = policy(false, &["a.example", "b.example"], &[]);
        let marks = (two.judge(&ask("a.example.")), two.judge(&ask("b.example.")));
        assert_ne!(marks.0, marks.1);
    }

    #[test]
    fn addresses_are_those_of_the_name_that_was_asked_for() {
        let question = ask("www.example.com.");
        let answer = answer(
            &question,
            vec![
                address("cdn.example.net.", 1, 30),
                alias("www.example.com.", "edge.example.net."),
                alias("edge.example.net.", "cdn.example.net."),
                address("cdn.example.net.", 2, 999_999),
                address("other.example.", 3, 30),
            ],
        );
        assert_eq!(
            answer.addresses(),
            [
                (Ipv4Addr::new(192, 0, 2, 1), Duration::from_secs(30)),
                (Ipv4Addr::new(192, 0, 2, 2), Duration::from_hours(1)),
            ]
        );
    }

    #[test]
    fn aliases_that_turn_in_a_circle_end() {
        let question = ask("a.example.");
        let answer = answer(
            &question,
            vec![
                alias("a.example.", "b.example."),
                alias("b.example.", "a.example."),
            ],
        );
        assert!(answer.addresses().is_empty());
    }

    #[test]
    fn an_alias_to_a_denied_name_is_withheld() {
        let question = ask("innocent.example.");
        let answer = answer(&question, vec![alias("innocent.example.", "bad.example.")]);
        assert!(policy(true, &[], &["bad.example"]).withholds(&answer));
        assert!(!policy(true, &[], &["worse.example"]).withholds(&answer));
    }

    #[test]
    fn only_the_answer_to_the_question_is_taken() {
        let question = ask("example.com.");
        let other = ask("example.org.");
        let mut message = Message::response(9, OpCode::Query);
        message.add_query(question.query.clone());
        let bytes = message.to_vec().unwrap();
        assert!(question.answer(9, &bytes).is_some());
        assert!(question.answer(8, &bytes).is_none(), "another ID");
        assert!(other.answer(9, &bytes).is_none(), "another name");
        assert!(
            question
                .answer(9, &question.to_server(9).unwrap())
                .is_none()
        );
    }

    #[test]
    fn the_guest_keeps_no_answer_longer_than_its_addresses_are_open() {
        let question = ask("example.com.");
        let answer = answer(&question, vec![address("example.com.", 1, 999_999)]);
        let passed = Message::from_vec(&question.pass_on(answer, 512).unwrap()).unwrap();
        assert_eq!(passed.metadata.id, 7);
        assert_eq!(passed.answers[0].ttl, LONGEST);
    }

    #[test]
    fn what_is_too_long_for_udp_is_cut() {
        let question = ask("example.com.");
        let records = (0..60).map(|last| address("example.com.", last, 60));
        let answer = answer(&question, records.collect());
        let bytes = question.pass_on(answer, question.udp_limit()).unwrap();
        let passed = Message::from_vec(&bytes).unwrap();
        assert!(passed.metadata.truncation && passed.answers.is_empty());
        assert!(bytes.len() <= 512);
    }

    #[test]
    fn what_is_no_question_is_refused_or_ignored() {
        let code = |message: &Message| match Question::read(&message.to_vec().unwrap()) {
            Ok(_) => panic!("it was taken"),
            Err(answer) => {
                answer.map(|bytes| Message::from_vec(&bytes).unwrap().metadata.response_code)
            }
        };
        let query = |kind| Query::query(name("example.com."), kind);
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        assert_eq!(code(&message), Some(ResponseCode::FormErr), "no question");
        message.add_query(query(RecordType::AXFR));
        assert_eq!(code(&message), Some(ResponseCode::Refused), "a whole zone");
        message.add_query(query(RecordType::A));
        assert_eq!(code(&message), Some(ResponseCode::FormErr), "two questions");
        let mut message = Message::new(7, MessageType::Query, OpCode::Update);
        message.add_query(query(RecordType::SOA));
        assert_eq!(code(&message), Some(ResponseCode::NotImp));
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(query(RecordType::A));
        assert_eq!(code(&message), None, "an answer");
    }

    proptest! {
        #[test]
        fn garbage_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Question::read(&bytes);
            let _ = ask("example.com.").answer(9, &bytes);
        }
    }
}
