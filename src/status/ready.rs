//! Whether a visitor who comes now would be served, as asked by a health check.

use std::fmt::{self, Write as _};

use super::http::{Code, Response};

/// Where readiness is asked for.
pub const PATH: &str = "/readyz";

/// The answer to a health check: no reason why not means ready.
pub fn response(not_ready: &[String]) -> Response {
    let code = match not_ready {
        [] => Code::Ok,
        _ => Code::Unavailable,
    };
    let why: Vec<_> = not_ready.iter().map(|it| Json(it).to_string()).collect();
    let (ready, why) = (not_ready.is_empty(), why.join(","));
    let body = format!("{{\"ready\":{ready},\"why\":[{why}]}}\n");
    Response::new(code, "application/json", body)
}

/// A string as it stands in JSON.
struct Json<'a>(&'a str);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for char in self.0.chars() {
            match char {
                '"' | '\\' => write!(f, "\\{char}")?,
                '\0'..='\x1f' => write!(f, "\\u{:04x}", char as u32)?,
                char => f.write_char(char)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_json() {
        let ready = response(&[]);
        assert_eq!(ready.code, Code::Ok);
        assert_eq!(ready.body, "{\"ready\":true,\"why\":[]}\n");
        let not_ready = response(&["a \"b\" \\\n\u{1}\u{7f}é".to_owned(), "c".to_owned()]);
        assert_eq!(not_ready.code, Code::Unavailable);
        let wanted =
            "{\"ready\":false,\"why\":[\"a \\\"b\\\" \\\\\\u000a\\u0001\u{7f}é\",\"c\"]}\n";
        assert_eq!(not_ready.body, wanted);
    }
}
